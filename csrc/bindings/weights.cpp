// pipedream_hpc._weights: buffers, the weight pool and fused optimizer steps. Needs no MPI.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <vector>

#include "bindings/view.hpp"
#include "memory/memory.hpp"
#include "memory/streams.hpp"
#include "weights/fused.hpp"
#include "weights/weight_pool.hpp"

namespace py = pybind11;
using namespace pipedream;

namespace {

using Addresses = std::array<std::uintptr_t, 6>;  // count, weights, target, gradient, first, second

template <typename Rule>
void step(const Rule& rule, const std::vector<Addresses>& tensors, bool bfloat16_weights, bool bfloat16_gradients,
          int threads, bool fma, std::optional<bool> streaming, std::optional<std::uintptr_t> stream) {
  std::vector<Operand> operands;
  operands.reserve(tensors.size());
  for (const Addresses& each : tensors) {
    operands.push_back({each[0], reinterpret_cast<float*>(each[1]), reinterpret_cast<void*>(each[2]),
                        reinterpret_cast<const void*>(each[3]), reinterpret_cast<float*>(each[4]),
                        reinterpret_cast<float*>(each[5])});
  }
  const py::gil_scoped_release released;
  const Format format{bfloat16_weights, bfloat16_gradients};
  if (stream) return cuda::fused_step(rule, operands, format, *stream);
  const Stores stores = !streaming ? Stores::automatic : *streaming ? Stores::streaming : Stores::cached;
  fused_step(rule, operands, format, {threads, fma, stores});
}

template <typename Rule>
void bind_step(py::module_& module) {
  module.def("fused_step", &step<Rule>, py::arg("rule"), py::arg("tensors"), py::kw_only(),
             py::arg("bfloat16_weights") = false, py::arg("bfloat16_gradients") = false, py::arg("threads") = 1,
             py::arg("fma") = false, py::arg("streaming") = py::none(), py::arg("stream") = py::none());
}

void bind_fused(py::module_& module) {
  const auto single = [](double value) { return static_cast<float>(value); };
  py::class_<Sgd>(module, "Sgd")
      .def(py::init([=](double rate, double weight_decay, double momentum, double undampened, bool first, bool nesterov,
                        bool maximize) {
             const Momentum buffer = momentum == 0 ? Momentum::none : first ? Momentum::first : Momentum::kept;
             return Sgd{
                 single(rate), single(weight_decay), single(momentum), single(undampened), maximize ? -1.0f : 1.0f,
                 buffer,       weight_decay != 0,    nesterov};
           }),
           py::kw_only(), py::arg("rate"), py::arg("weight_decay"), py::arg("momentum"), py::arg("undampened"),
           py::arg("first"), py::arg("nesterov"), py::arg("maximize"));
  py::class_<Adam>(module, "Adam")
      .def(py::init([=](double rate, double weight_decay, double weight1, double beta2, double weight2,
                        double correction2, double epsilon, bool decoupled, bool maximize) {
             const Decay decay = decoupled ? Decay::decoupled : weight_decay != 0 ? Decay::coupled : Decay::none;
             return Adam{single(rate),    single(weight_decay),    single(weight1),
                         single(beta2),   single(weight2),         single(correction2),
                         single(epsilon), maximize ? -1.0f : 1.0f, decay};
           }),
           py::kw_only(), py::arg("rate"), py::arg("weight_decay"), py::arg("weight1"), py::arg("beta2"),
           py::arg("weight2"), py::arg("correction2"), py::arg("epsilon"), py::arg("decoupled"), py::arg("maximize"));
  module.def("cpu_has_fma", &cpu_has_fma);
  bind_step<Sgd>(module);
  bind_step<Adam>(module);
}

}  // namespace

PYBIND11_MODULE(_weights, module) {
  module.doc() = "Buffers, the weight pool and fused optimizer steps.";

  bind_view(module);

  module.def("allocations", &allocations);
  module.def("cuda_compiled", &cuda::compiled);
  module.def("cuda_device_count", &cuda::device_count);

  py::class_<Buffer>(module, "Buffer")
      .def(py::init(
               [](std::size_t bytes, const std::string& memory) { return Buffer(bytes, memory_kind_from(memory)); }),
           py::arg("nbytes"), py::arg("memory") = "host")
      .def("view", [](const Buffer& buffer) { return buffer.view(); }, py::keep_alive<0, 1>());
  module.def(
      "copy",
      [](View target, View source) {
        if (target.bytes != source.bytes) throw std::invalid_argument("copy needs two views of the same size");
        copy(target, source, source.bytes);
      },
      py::arg("target"), py::arg("source"), py::call_guard<py::gil_scoped_release>());
  module.def("use_device", &cuda::use_device, py::arg("index"));

  py::class_<WeightPool>(module, "WeightPool")
      .def(py::init([](std::size_t bytes, std::size_t slabs, const std::string& memory) {
             return std::make_unique<WeightPool>(bytes, slabs, memory_kind_from(memory));
           }),
           py::arg("nbytes"), py::arg("slabs"), py::arg("memory") = "host")
      .def_property_readonly("newest", &WeightPool::newest)
      .def_property_readonly("newest_slab", &WeightPool::newest_slab)
      .def_property_readonly("holders", &WeightPool::holders)
      .def("__len__", &WeightPool::size)
      .def("slab", &WeightPool::slab, py::arg("index"), py::keep_alive<0, 1>())
      .def("acquire", &WeightPool::acquire, py::arg("microbatch"), py::arg("version") = -1)
      .def("slab_of", &WeightPool::slab_of, py::arg("microbatch"))
      .def("version_of", &WeightPool::version_of, py::arg("microbatch"))
      .def("release", &WeightPool::release, py::arg("microbatch"))
      .def(
          "begin_update",
          [](WeightPool& pool, bool copy, bool overwrite) {
            const WeightPool::Update update = pool.begin_update(copy, overwrite);
            return py::make_tuple(update.source, update.target);
          },
          py::arg("copy"), py::arg("overwrite") = false)
      .def("commit", &WeightPool::commit);

  bind_fused(module);
}
