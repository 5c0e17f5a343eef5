// pipedream_hpc._solver: the inner loop of the partition solver. Needs neither MPI nor a GPU.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "solver/min_devices.hpp"

namespace py = pybind11;
using namespace pipedream;

namespace {

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

std::vector<double> by_cut(const Array& array, std::size_t cuts) {
  if (array.ndim() != 1 || static_cast<std::size_t>(array.shape(0)) != cuts) {
    throw std::invalid_argument("an array by cut needs one number per cut");
  }
  return {array.data(), array.data() + array.size()};
}

Table table(const Array& array, const Problem& problem) {
  if (array.ndim() != 2 || static_cast<std::size_t>(array.shape(0)) != problem.period ||
      array.shape(1) != problem.devices) {
    throw std::invalid_argument("a table needs a row per position in the period and a column per device");
  }
  return {{array.data(), array.data() + array.size()}, static_cast<std::size_t>(array.shape(1))};
}

MinDevices make(const Array& round_s, const Array& round_s_per_byte, const Array& parameter_bytes, double copies,
                bool straight, bool overlap, bool first_output_free,
                const std::vector<std::tuple<Array, Array, Array>>& levels,
                const std::vector<std::pair<Array, std::vector<std::tuple<Array, Array, Array>>>>& modes,
                double memory_bytes, std::vector<std::vector<std::int32_t>> begins) {
  if (round_s.ndim() != 2) throw std::invalid_argument("a table needs two dimensions");
  Problem problem;
  problem.period = static_cast<std::size_t>(round_s.shape(0));
  problem.devices = round_s.shape(1);
  problem.copies = copies;
  problem.straight = straight;
  problem.overlap = overlap;
  problem.first_output_free = first_output_free;
  problem.memory_bytes = memory_bytes;
  const std::size_t cuts = static_cast<std::size_t>(parameter_bytes.size());
  problem.parameter_bytes = by_cut(parameter_bytes, cuts);
  problem.round_s = table(round_s, problem);
  problem.round_s_per_byte = table(round_s_per_byte, problem);
  for (const auto& [into, out_of, transfer_s] : levels) {
    problem.levels.push_back({table(into, problem), table(out_of, problem), by_cut(transfer_s, cuts)});
  }
  for (const auto& [time_s, memory] : modes) {
    Mode mode{by_cut(time_s, cuts), {}};
    for (const auto& [before, entering, leaving] : memory) {
      mode.memory.push_back({by_cut(before, cuts), by_cut(entering, cuts), by_cut(leaving, cuts)});
    }
    if (!mode.memory.empty() && mode.memory.size() != 3)
      throw std::invalid_argument("memory needs three levels or none");
    problem.modes.push_back(std::move(mode));
  }
  if (begins.size() != cuts) throw std::invalid_argument("begins needs one list per cut");
  for (std::size_t last = 0; last < cuts; ++last) {
    for (const std::int32_t first : begins[last]) {
      if (first < 0 || static_cast<std::size_t>(first) >= last) {
        throw std::invalid_argument("a stage must end at a later cut than it begins");
      }
    }
  }
  problem.begins = std::move(begins);
  return MinDevices(std::move(problem));
}

}  // namespace

PYBIND11_MODULE(_solver, module) {
  module.doc() = "The inner loop of the partition solver.";

  py::class_<MinDevices>(module, "MinDevices")
      .def(py::init(&make), py::kw_only(), py::arg("round_s"), py::arg("round_s_per_byte"), py::arg("parameter_bytes"),
           py::arg("copies"), py::arg("straight"), py::arg("overlap"), py::arg("first_output_free"), py::arg("levels"),
           py::arg("modes"), py::arg("memory_bytes"), py::arg("begins"))
      .def(
          "within",
          [](const MinDevices& search, double time_s) -> py::object {
            const auto stages = search.within(time_s);
            if (!stages) return py::none();
            py::list pairs;
            for (const Stage& stage : *stages) pairs.append(py::make_tuple(stage.last, stage.replicas));
            return pairs;
          },
          py::arg("time_s"));
}
