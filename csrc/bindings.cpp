// pipedream_hpc._core: channels over MPI.
#include <mpi4py/mpi4py.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "channel.hpp"
#include "mpi_error.hpp"
#include "progress.hpp"
#include "reduction.hpp"

namespace py = pybind11;
using namespace pipedream;

namespace {

MPI_Comm communicator(py::handle object) {
  MPI_Comm* comm = PyMPIComm_Get(object.ptr());
  if (comm == nullptr) throw py::error_already_set();
  return *comm;
}

// The interpreter keeps its say while the core waits: Ctrl-C, for one.
Waiting waiting(double stall_limit_s) {
  return {stall_limit_s, [] {
            py::gil_scoped_acquire held;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
          }};
}

// (label, dtype, bytes of an element, shape)
using PartOf = std::tuple<std::string, std::string, std::size_t, Shape>;

Line line(int peer, int tag, const std::vector<PartOf>& parts, const std::string& memory, bool staged,
          std::size_t chunk) {
  Line made{peer, tag, {}, where_from(memory), staged ? Route::staged : Route::direct, chunk};
  for (const auto& [label, dtype, item, shape] : parts) made.parts.push_back({label, dtype, item, shape});
  // No more pinned memory than there is to carry; the other end knows the same parts.
  made.chunk = std::max<std::size_t>(1, std::min(chunk, made.capacity()));
  return made;
}

const std::size_t usual_chunk = Line{0, 0, {}}.chunk;

cuda::Handle handle(std::uintptr_t stream) { return reinterpret_cast<cuda::Handle>(stream); }

std::string library_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(text, &length);
  return std::string(text, static_cast<std::size_t>(length));
}

std::string built_with() {
#if defined(OPEN_MPI)
  return "Open MPI " + std::to_string(OMPI_MAJOR_VERSION) + "." + std::to_string(OMPI_MINOR_VERSION) + "." +
         std::to_string(OMPI_RELEASE_VERSION);
#elif defined(MPICH_VERSION)
  return "MPICH " MPICH_VERSION;
#else
  return "MPI " + std::to_string(MPI_VERSION) + "." + std::to_string(MPI_SUBVERSION);
#endif
}

bool initialized() {
  int flag = 0;
  MPI_Initialized(&flag);
  return flag != 0;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Channels over MPI.";
  py::module_::import("pipedream_hpc._memory");  // registers View
  if (import_mpi4py() < 0) {
    // mpi4py's own words are about sizes of structures; what helps is the name of the other MPI.
    PyErr_Clear();
    throw py::import_error("built with " + built_with());
  }

  auto core_error = py::register_exception<CoreError>(module, "CoreError", PyExc_RuntimeError);
  py::register_exception<MpiError>(module, "MpiError", core_error);
  py::register_exception<MessageError>(module, "MessageError", core_error);
  py::register_exception<StallError>(module, "StallError", core_error);

  module.def("library_version", &library_version);
  module.def("built_with", &built_with);
  module.def("initialized", &initialized);
  module.def("allocations", &allocations);
  module.attr("comm_bytes") = sizeof(MPI_Comm);

  py::class_<Progress, std::shared_ptr<Progress>>(module, "Progress")
      .def(py::init([](py::object comm, bool crowded, int device, std::vector<int> cores, bool spare) {
             return std::make_shared<Progress>(communicator(comm), crowded, device, std::move(cores), spare);
           }),
           py::arg("comm"), py::kw_only(), py::arg("crowded") = false, py::arg("device") = -1,
           py::arg("cores") = std::vector<int>(), py::arg("spare") = false)
      .def("close", &Progress::close, py::call_guard<py::gil_scoped_release>())
      .def("statistics", [](Progress& progress) {
        const ProgressStatistics now = progress.statistics();
        py::dict counts;
        counts["polls_waiting"] = now.polls_waiting;
        counts["polls_computing"] = now.polls_computing;
        counts["completions"] = now.completions;
        return counts;
      });

  py::class_<SendChannel>(module, "SendChannel")
      .def(py::init([](std::shared_ptr<Progress> progress, int peer, int tag, const std::vector<PartOf>& parts,
                       const std::string& memory, bool staged, std::size_t chunk) {
             return SendChannel::make(std::move(progress), line(peer, tag, parts, memory, staged, chunk));
           }),
           py::arg("progress"), py::arg("peer"), py::arg("tag"), py::arg("parts"), py::arg("memory") = "host",
           py::arg("staged") = false, py::arg("chunk") = usual_chunk)
      .def(
          "send",
          [](SendChannel& channel, std::int64_t minibatch,
             const std::vector<std::pair<std::uintptr_t, std::optional<Shape>>>& tensors, double stall_limit_s,
             std::uintptr_t stream) {
            std::vector<Piece> pieces;
            pieces.reserve(tensors.size());
            for (const auto& [address, shape] : tensors) {
              const auto* const data = reinterpret_cast<const void*>(address);
              pieces.push_back({data, shape ? *shape : channel.planned(pieces.size())});
            }
            py::gil_scoped_release released;
            channel.send(minibatch, pieces, waiting(stall_limit_s), handle(stream));
          },
          py::arg("minibatch"), py::arg("tensors"), py::arg("stall_limit_s"), py::arg("stream") = 0)
      .def(
          "drain",
          [](SendChannel& channel, double stall_limit_s) {
            py::gil_scoped_release released;
            channel.drain(waiting(stall_limit_s));
          },
          py::arg("stall_limit_s"))
      .def_property_readonly("in_flight", &SendChannel::in_flight)
      .def_property_readonly("messages", [](const SendChannel& channel) { return channel.traffic().messages; })
      .def_property_readonly("payload_bytes",
                             [](const SendChannel& channel) { return channel.traffic().payload_bytes; });

  py::class_<ReceiveChannel>(module, "ReceiveChannel")
      .def(py::init([](std::shared_ptr<Progress> progress, int peer, int tag, const std::vector<PartOf>& parts,
                       std::size_t slots, const std::string& memory, bool staged, std::size_t chunk) {
             return ReceiveChannel::make(std::move(progress), line(peer, tag, parts, memory, staged, chunk), slots);
           }),
           py::arg("progress"), py::arg("peer"), py::arg("tag"), py::arg("parts"), py::arg("slots"),
           py::arg("memory") = "host", py::arg("staged") = false, py::arg("chunk") = usual_chunk)
      .def("ready", &ReceiveChannel::ready)
      .def(
          "receive",
          [](ReceiveChannel& channel, std::int64_t minibatch, double stall_limit_s) -> py::tuple {
            Arrived arrived;
            {
              py::gil_scoped_release released;
              arrived = channel.receive(minibatch, waiting(stall_limit_s));
            }
            if (arrived.whole) return py::make_tuple(arrived.slot, py::none());
            py::list tensors;
            for (std::size_t i = 0; i < arrived.shapes.size(); ++i) {
              tensors.append(py::make_tuple(arrived.places[i].offset, py::tuple(py::cast(arrived.shapes[i]))));
            }
            return py::make_tuple(arrived.slot, tensors);
          },
          py::arg("minibatch"), py::arg("stall_limit_s"))
      .def("slot", &ReceiveChannel::slot, py::arg("index"), py::keep_alive<0, 1>())
      .def("__len__", &ReceiveChannel::slots)
      .def(
          "release",
          [](ReceiveChannel& channel, std::size_t index, std::uintptr_t stream) {
            channel.release(index, handle(stream));
          },
          py::arg("index"), py::arg("stream") = 0)
      .def_property_readonly("messages", [](const ReceiveChannel& channel) { return channel.traffic().messages; })
      .def_property_readonly("payload_bytes",
                             [](const ReceiveChannel& channel) { return channel.traffic().payload_bytes; });

  module.def(
      "places",
      [](const std::vector<PartOf>& parts) {
        std::vector<std::size_t> offsets;
        for (const Place& place : line(0, 0, parts, "host", false, 0).places()) offsets.push_back(place.offset);
        return offsets;
      },
      py::arg("parts"));

  py::class_<Reduction>(module, "Reduction")
      .def(py::init([](std::shared_ptr<Progress> progress, py::object comm,
                       const std::vector<std::pair<std::size_t, std::string>>& buckets, bool ordered,
                       std::string label) {
             std::vector<BucketShape> shapes;
             for (const auto& [count, dtype] : buckets) shapes.push_back({count, number_from(dtype)});
             return std::make_unique<Reduction>(std::move(progress), communicator(comm), shapes, ordered,
                                                std::move(label));
           }),
           py::arg("progress"), py::arg("comm"), py::arg("buckets"), py::arg("ordered"), py::arg("label"))
      .def("__len__", &Reduction::size)
      .def("bucket", &Reduction::bucket, py::arg("index"), py::keep_alive<0, 1>())
      .def("start", &Reduction::start, py::arg("index"), py::call_guard<py::gil_scoped_release>())
      .def("done", &Reduction::done, py::arg("index"), py::call_guard<py::gil_scoped_release>())
      .def(
          "wait",
          [](Reduction& reduction, std::size_t index, double stall_limit_s) {
            py::gil_scoped_release released;
            reduction.wait(index, waiting(stall_limit_s));
          },
          py::arg("index"), py::arg("stall_limit_s"));
}
