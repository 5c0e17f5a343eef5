// pipedream_hpc._memory: buffers and the weight pool. Needs no MPI.
#include <pybind11/pybind11.h>

#include "memory.hpp"
#include "view_binding.hpp"
#include "weight_pool.hpp"

namespace py = pybind11;
using namespace pipedream;

PYBIND11_MODULE(_memory, module) {
  module.doc() = "Buffers and the weight pool.";

  bind_view(module);

  module.def("allocations", &allocations);
  module.def("cuda_compiled", &cuda::compiled);
  module.def("cuda_device_count", &cuda::device_count);

  py::class_<WeightPool>(module, "WeightPool")
      .def(py::init([](std::size_t bytes, std::size_t slabs, const std::string& memory) {
             return std::make_unique<WeightPool>(bytes, slabs, where_from(memory));
           }),
           py::arg("nbytes"), py::arg("slabs"), py::arg("memory") = "host")
      .def_property_readonly("newest", &WeightPool::newest)
      .def_property_readonly("newest_slab", &WeightPool::newest_slab)
      .def_property_readonly("holders", &WeightPool::holders)
      .def("__len__", &WeightPool::size)
      .def("slab", &WeightPool::slab, py::arg("index"), py::keep_alive<0, 1>())
      .def("acquire", &WeightPool::acquire, py::arg("minibatch"), py::arg("version") = -1)
      .def("slab_of", &WeightPool::slab_of, py::arg("minibatch"))
      .def("version_of", &WeightPool::version_of, py::arg("minibatch"))
      .def("release", &WeightPool::release, py::arg("minibatch"))
      .def(
          "begin_update",
          [](WeightPool& pool, bool copy, bool overwrite) {
            const WeightPool::Step step = pool.begin_update(copy, overwrite);
            return py::make_tuple(step.source, step.target);
          },
          py::arg("copy"), py::arg("overwrite") = false)
      .def("commit", &WeightPool::commit);
}
