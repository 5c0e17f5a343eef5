// pipedream_hpc._solver: the inner loop of the partition solver. Needs neither MPI nor a GPU.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "reach.hpp"

namespace py = pybind11;
using namespace pipedream;

namespace {

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

std::vector<double> by_cut(const Array& array, std::size_t cuts) {
  if (array.ndim() != 1 || static_cast<std::size_t>(array.shape(0)) != cuts) {
    throw std::invalid_argument("an array by cut should have one number per cut");
  }
  return {array.data(), array.data() + array.size()};
}

Table table(const Array& array, const Question& question) {
  if (array.ndim() != 2 || static_cast<std::size_t>(array.shape(0)) != question.period ||
      array.shape(1) != question.devices) {
    throw std::invalid_argument("a table should have a row per place in the period and a column per device");
  }
  return {{array.data(), array.data() + array.size()}, static_cast<std::size_t>(array.shape(1))};
}

Reach make(const Array& round_s, const Array& round_s_per_byte, const Array& parameter_bytes, double copies,
           bool straight, bool overlap, bool first_output_free,
           const std::vector<std::tuple<Array, Array, Array>>& levels,
           const std::vector<std::pair<Array, std::vector<std::tuple<Array, Array, Array>>>>& modes,
           double memory_bytes, std::vector<std::vector<std::int32_t>> begins) {
  if (round_s.ndim() != 2) throw std::invalid_argument("a table should have two dimensions");
  Question question;
  question.period = static_cast<std::size_t>(round_s.shape(0));
  question.devices = round_s.shape(1);
  question.copies = copies;
  question.straight = straight;
  question.overlap = overlap;
  question.first_output_free = first_output_free;
  question.memory_bytes = memory_bytes;
  const std::size_t cuts = static_cast<std::size_t>(parameter_bytes.size());
  question.parameter_bytes = by_cut(parameter_bytes, cuts);
  question.round_s = table(round_s, question);
  question.round_s_per_byte = table(round_s_per_byte, question);
  for (const auto& [into, out_of, transfer_s] : levels) {
    question.levels.push_back({table(into, question), table(out_of, question), by_cut(transfer_s, cuts)});
  }
  for (const auto& [time_s, memory] : modes) {
    Mode mode{by_cut(time_s, cuts), {}};
    for (const auto& [before, entering, leaving] : memory) {
      mode.memory.push_back({by_cut(before, cuts), by_cut(entering, cuts), by_cut(leaving, cuts)});
    }
    if (!mode.memory.empty() && mode.memory.size() != 3) throw std::invalid_argument("memory has three levels or none");
    question.modes.push_back(std::move(mode));
  }
  if (begins.size() != cuts) throw std::invalid_argument("begins should have one list per cut");
  for (std::size_t last = 0; last < cuts; ++last) {
    for (const std::int32_t first : begins[last]) {
      if (first < 0 || static_cast<std::size_t>(first) >= last) {
        throw std::invalid_argument("a stage should end at a later cut than it begins");
      }
    }
  }
  question.begins = std::move(begins);
  return Reach(std::move(question));
}

}  // namespace

PYBIND11_MODULE(_solver, module) {
  module.doc() = "The inner loop of the partition solver.";

  py::class_<Reach>(module, "Reach")
      .def(py::init(&make), py::kw_only(), py::arg("round_s"), py::arg("round_s_per_byte"), py::arg("parameter_bytes"),
           py::arg("copies"), py::arg("straight"), py::arg("overlap"), py::arg("first_output_free"), py::arg("levels"),
           py::arg("modes"), py::arg("memory_bytes"), py::arg("begins"))
      .def(
          "within",
          [](const Reach& reach, double time_s) -> py::object {
            const auto stages = reach.within(time_s);
            if (!stages) return py::none();
            py::list pairs;
            for (const Stage& stage : *stages) pairs.append(py::make_tuple(stage.last, stage.replicas));
            return pairs;
          },
          py::arg("time_s"));
}
