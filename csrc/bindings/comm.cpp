// pipedream_hpc._comm: channels, all-reduces and losses over MPI.
#include <mpi4py/mpi4py.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "comm/allreduce.hpp"
#include "comm/channel.hpp"
#include "comm/loss_board.hpp"
#include "comm/mpi_error.hpp"
#include "comm/progress.hpp"

namespace py = pybind11;
using namespace pipedream;

namespace {

MPI_Comm communicator(py::handle object) {
  MPI_Comm* comm = PyMPIComm_Get(object.ptr());
  if (comm == nullptr) throw py::error_already_set();
  return *comm;
}

// Lets the interpreter handle signals such as Ctrl-C while the core waits.
WaitOptions wait_options(double stall_limit_s) {
  return {stall_limit_s, [] {
            py::gil_scoped_acquire held;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
          }};
}

// (label, dtype, bytes of an element, shape)
using SpecTuple = std::tuple<std::string, std::string, std::size_t, Shape>;

ChannelSpec channel_spec(int peer_rank, int tag, const std::vector<SpecTuple>& specs, const std::string& memory,
                         bool staged, std::size_t chunk) {
  ChannelSpec made{peer_rank, tag, {}, memory_kind_from(memory), staged ? Route::staged : Route::direct, chunk};
  for (const auto& [label, dtype, item_bytes, shape] : specs) made.tensors.push_back({label, dtype, item_bytes, shape});
  // A pinned buffer is no larger than a message. Both ends compute the same size, since they have the same specs.
  made.chunk = std::max<std::size_t>(1, std::min(chunk, made.capacity()));
  return made;
}

const std::size_t default_chunk = ChannelSpec{0, 0, {}}.chunk;

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

PYBIND11_MODULE(_comm, module) {
  module.doc() = "Channels, all-reduces and losses over MPI.";
  py::module_::import("pipedream_hpc._weights");  // registers View
  if (import_mpi4py() < 0) {
    // mpi4py's message is about sizes of structures; the name of the MPI of the build is more helpful.
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
      .def(py::init([](py::object comm, bool oversubscribed, int device, std::vector<int> cores, bool spare) {
             return std::make_shared<Progress>(communicator(comm), oversubscribed, device, std::move(cores), spare);
           }),
           py::arg("comm"), py::kw_only(), py::arg("oversubscribed") = false, py::arg("device") = -1,
           py::arg("cores") = std::vector<int>(), py::arg("spare") = false)
      .def("close", &Progress::close, py::call_guard<py::gil_scoped_release>())
      .def(
          "set_position",
          [](Progress& progress, std::string where, std::int64_t first, int n_microbatches) {
            progress.set_position(RunPosition(std::move(where), first, n_microbatches));
          },
          py::arg("where"), py::arg("first"), py::arg("n_microbatches"), py::call_guard<py::gil_scoped_release>())
      .def(
          "microbatch_name",
          [](Progress& progress, std::int64_t microbatch) {
            const Progress::Lock held = progress.lock();
            return progress.microbatch_name(microbatch);
          },
          py::arg("microbatch"), py::call_guard<py::gil_scoped_release>())
      .def("statistics", [](Progress& progress) {
        const ProgressStatistics now = progress.statistics();
        py::dict counts;
        counts["polls_waiting"] = now.polls_waiting;
        counts["polls_computing"] = now.polls_computing;
        counts["completions"] = now.completions;
        return counts;
      });

  py::class_<SendChannel>(module, "SendChannel")
      .def(py::init([](std::shared_ptr<Progress> progress, int peer_rank, int tag, const std::vector<SpecTuple>& specs,
                       const std::string& memory, bool staged, std::size_t chunk) {
             return SendChannel::make(std::move(progress), channel_spec(peer_rank, tag, specs, memory, staged, chunk));
           }),
           py::arg("progress"), py::arg("peer_rank"), py::arg("tag"), py::arg("specs"), py::arg("memory") = "host",
           py::arg("staged") = false, py::arg("chunk") = default_chunk)
      .def(
          "send",
          [](SendChannel& channel, std::int64_t microbatch,
             const std::vector<std::pair<std::uintptr_t, std::optional<Shape>>>& tensors, double stall_limit_s,
             std::uintptr_t stream) {
            std::vector<TensorRef> refs;
            refs.reserve(tensors.size());
            for (const auto& [address, shape] : tensors) {
              const auto* const data = reinterpret_cast<const void*>(address);
              refs.push_back({data, shape ? *shape : channel.planned(refs.size())});
            }
            py::gil_scoped_release released;
            channel.send(microbatch, refs, wait_options(stall_limit_s), handle(stream));
          },
          py::arg("microbatch"), py::arg("tensors"), py::arg("stall_limit_s"), py::arg("stream") = 0)
      .def(
          "drain",
          [](SendChannel& channel, double stall_limit_s) {
            py::gil_scoped_release released;
            channel.drain(wait_options(stall_limit_s));
          },
          py::arg("stall_limit_s"))
      .def_property_readonly("in_flight", &SendChannel::in_flight)
      .def_property_readonly("messages", [](const SendChannel& channel) { return channel.traffic().messages; })
      .def_property_readonly("payload_bytes",
                             [](const SendChannel& channel) { return channel.traffic().payload_bytes; });

  py::class_<RecvChannel>(module, "RecvChannel")
      .def(py::init([](std::shared_ptr<Progress> progress, int peer_rank, int tag, const std::vector<SpecTuple>& specs,
                       std::size_t slots, const std::string& memory, bool staged, std::size_t chunk) {
             return RecvChannel::make(std::move(progress), channel_spec(peer_rank, tag, specs, memory, staged, chunk),
                                      slots);
           }),
           py::arg("progress"), py::arg("peer_rank"), py::arg("tag"), py::arg("specs"), py::arg("slots"),
           py::arg("memory") = "host", py::arg("staged") = false, py::arg("chunk") = default_chunk)
      .def("ready", &RecvChannel::ready)
      .def(
          "receive",
          [](RecvChannel& channel, std::int64_t microbatch, double stall_limit_s) -> py::tuple {
            Received received;
            {
              py::gil_scoped_release released;
              received = channel.receive(microbatch, wait_options(stall_limit_s));
            }
            if (received.as_planned) return py::make_tuple(received.slot, py::none());
            py::list tensors;
            for (std::size_t i = 0; i < received.shapes.size(); ++i) {
              tensors.append(py::make_tuple(received.ranges[i].offset, py::tuple(py::cast(received.shapes[i]))));
            }
            return py::make_tuple(received.slot, tensors);
          },
          py::arg("microbatch"), py::arg("stall_limit_s"))
      .def("slot", &RecvChannel::slot, py::arg("index"), py::keep_alive<0, 1>())
      .def("__len__", &RecvChannel::slots)
      .def(
          "release",
          [](RecvChannel& channel, std::size_t index, std::uintptr_t stream) {
            channel.release(index, handle(stream));
          },
          py::arg("index"), py::arg("stream") = 0)
      .def_property_readonly("messages", [](const RecvChannel& channel) { return channel.traffic().messages; })
      .def_property_readonly("payload_bytes",
                             [](const RecvChannel& channel) { return channel.traffic().payload_bytes; });

  py::class_<LossBoard>(module, "LossBoard")
      .def(py::init<std::shared_ptr<Progress>, std::size_t>(), py::arg("progress"), py::arg("capacity"))
      .def(
          "publish",
          [](LossBoard& board, std::int64_t microbatch, double value, double weight, bool counted) {
            board.publish(microbatch, {value, weight, counted});
          },
          py::arg("microbatch"), py::arg("value"), py::arg("weight"), py::arg("counted") = false)
      .def(
          "ask",
          [](LossBoard& board, int owner_rank, std::int64_t microbatch, double stall_limit_s) {
            Loss loss;
            {
              py::gil_scoped_release released;
              loss = board.ask(owner_rank, microbatch, wait_options(stall_limit_s));
            }
            return py::make_tuple(loss.value, loss.weight, loss.counted);
          },
          py::arg("owner_rank"), py::arg("microbatch"), py::arg("stall_limit_s"));

  module.def(
      "tensor_offsets",
      [](const std::vector<SpecTuple>& specs) {
        std::vector<std::size_t> offsets;
        for (const ByteRange& range : channel_spec(0, 0, specs, "host", false, 0).layout())
          offsets.push_back(range.offset);
        return offsets;
      },
      py::arg("specs"));

  py::class_<AllReduce>(module, "AllReduce")
      .def(py::init([](std::shared_ptr<Progress> progress, py::object comm,
                       const std::vector<std::pair<std::size_t, std::string>>& buckets, bool ordered,
                       std::string label) {
             std::vector<BucketSpec> specs;
             for (const auto& [count, dtype] : buckets) specs.push_back({count, dtype_from(dtype)});
             return std::make_unique<AllReduce>(std::move(progress), communicator(comm), specs, ordered,
                                                std::move(label));
           }),
           py::arg("progress"), py::arg("comm"), py::arg("buckets"), py::arg("ordered"), py::arg("label"))
      .def("__len__", &AllReduce::size)
      .def("bucket", &AllReduce::bucket, py::arg("index"), py::keep_alive<0, 1>())
      .def("start", &AllReduce::start, py::arg("index"), py::call_guard<py::gil_scoped_release>())
      .def("done", &AllReduce::done, py::arg("index"), py::call_guard<py::gil_scoped_release>())
      .def(
          "wait",
          [](AllReduce& allreduce, std::size_t index, double stall_limit_s) {
            py::gil_scoped_release released;
            allreduce.wait(index, wait_options(stall_limit_s));
          },
          py::arg("index"), py::arg("stall_limit_s"));
}
