#include "comm/allreduce.hpp"

#include <cstring>
#include <stdexcept>

#include "comm/mpi_error.hpp"

namespace pipedream {

namespace {

float widen_bfloat16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Rounds to nearest, ties to even, as torch does.
std::uint16_t narrow_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // not a number
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float widen_float16(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fu;
  const std::uint32_t fraction = bits & 0x3ffu;
  std::uint32_t wide;
  if (exponent == 0x1f) {
    wide = sign | 0x7f800000u | (fraction << 13);
  } else if (exponent != 0) {
    wide = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else {
    const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return sign != 0 ? -small : small;
  }
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

std::uint16_t narrow_float16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // below 2^-14: after adding 0.5 the last bit counts 2^-24
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, sizeof bits);
    return static_cast<std::uint16_t>(sign | (bits - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
  return static_cast<std::uint16_t>(sign | (rounded >> 13));
}

// target = rows[0] + rows[1] + ..., in this order. Each row has `count` numbers.
template <typename T>
void sum_rows(T* target, const T* rows, std::size_t ranks, std::size_t count) {
  std::memcpy(target, rows, count * sizeof(T));
  for (std::size_t rank = 1; rank < ranks; ++rank) {
    const T* row = rows + rank * count;
    for (std::size_t i = 0; i < count; ++i) target[i] += row[i];
  }
}

// Sums in float32 and rounds once.
template <float widen(std::uint16_t), std::uint16_t narrow(float)>
void sum_halves(std::uint16_t* target, const std::uint16_t* rows, std::size_t ranks, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    float total = widen(rows[i]);
    for (std::size_t rank = 1; rank < ranks; ++rank) total += widen(rows[rank * count + i]);
    target[i] = narrow(total);
  }
}

void sum(std::byte* target, const std::byte* rows, std::size_t ranks, std::size_t count, DType dtype) {
  const auto as = [](auto* type, auto* bytes) { return reinterpret_cast<decltype(type)>(bytes); };
  const std::uint16_t* halves = reinterpret_cast<const std::uint16_t*>(rows);
  switch (dtype) {
    case DType::float32:
      return sum_rows(as(static_cast<float*>(nullptr), target), as(static_cast<const float*>(nullptr), rows), ranks,
                      count);
    case DType::float64:
      return sum_rows(as(static_cast<double*>(nullptr), target), as(static_cast<const double*>(nullptr), rows), ranks,
                      count);
    case DType::bfloat16:
      return sum_halves<widen_bfloat16, narrow_bfloat16>(reinterpret_cast<std::uint16_t*>(target), halves, ranks,
                                                         count);
    case DType::float16:
      return sum_halves<widen_float16, narrow_float16>(reinterpret_cast<std::uint16_t*>(target), halves, ranks, count);
  }
}

}  // namespace

DType dtype_from(const std::string& dtype) {
  if (dtype == "float32") return DType::float32;
  if (dtype == "float64") return DType::float64;
  if (dtype == "bfloat16") return DType::bfloat16;
  if (dtype == "float16") return DType::float16;
  throw std::invalid_argument("gradients of dtype " + dtype + " cannot be averaged over replicas");
}

std::size_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

AllReduce::AllReduce(std::shared_ptr<Progress> progress, MPI_Comm parent, const std::vector<BucketSpec>& buckets,
                     bool ordered, std::string label)
    : progress_(std::move(progress)), ordered_(ordered), label_(std::move(label)) {
  for (MPI_Comm* comm : {&scatter_, &gather_}) {
    check(MPI_Comm_dup(parent, comm), "MPI_Comm_dup", progress_->rank(), label_);
    MPI_Comm_set_errhandler(*comm, MPI_ERRORS_RETURN);
  }
  MPI_Comm_rank(scatter_, &rank_);
  MPI_Comm_size(scatter_, &ranks_);
  const std::size_t ranks = static_cast<std::size_t>(ranks_);
  for (const BucketSpec& spec : buckets) {
    const std::size_t shard = (spec.count + ranks - 1) / ranks;
    const std::size_t bytes = shard * ranks * bytes_of(spec.dtype);
    buckets_.emplace_back(
        new Bucket{Buffer(bytes, MemoryKind::host), Buffer(bytes, MemoryKind::host), shard, spec.dtype});
  }
  progress_->register_for_close(this);
}

AllReduce::~AllReduce() {
  progress_->forget(this);
  close();
}

void AllReduce::close() {
  int finalized = 0;
  MPI_Finalized(&finalized);
  bool quiet = !finalized;
  for (const std::shared_ptr<Bucket>& bucket : buckets_) {
    quiet &= bucket->state == State::idle || bucket->state == State::finished;
  }
  for (MPI_Comm* comm : {&scatter_, &gather_}) {
    if (*comm != MPI_COMM_NULL && quiet) MPI_Comm_free(comm);
    *comm = MPI_COMM_NULL;
  }
}

void AllReduce::start(std::size_t index) {
  Progress::Lock held = progress_->lock();
  progress_->check_usable();
  Bucket& bucket = *buckets_.at(index);
  if (bucket.state != State::idle) throw std::logic_error(describe(index) + " was started, but not waited for");
  const int bytes = static_cast<int>(bucket.shard * bytes_of(bucket.dtype));
  MPI_Request request;
  const bool sixteen_bits = bucket.dtype == DType::bfloat16 || bucket.dtype == DType::float16;
  if (ordered_ || sixteen_bits) {
    check(MPI_Ialltoall(bucket.values.data(), bytes, MPI_BYTE, bucket.arrived.data(), bytes, MPI_BYTE, scatter_,
                        &request),
          "MPI_Ialltoall", progress_->rank(), describe(index));
    bucket.state = State::scattering;
    started_.push_back(index);
  } else {
    const MPI_Datatype type = bucket.dtype == DType::float64 ? MPI_DOUBLE : MPI_FLOAT;
    check(MPI_Iallreduce(MPI_IN_PLACE, bucket.values.data(), static_cast<int>(bucket.shard) * ranks_, type, MPI_SUM,
                         scatter_, &request),
          "MPI_Iallreduce", progress_->rank(), describe(index));
    bucket.state = State::gathering;
  }
  progress_->collective(this, index, request);
}

bool AllReduce::done(std::size_t index) {
  progress_->poll_once();
  Progress::Lock held = progress_->lock();
  return buckets_.at(index)->state == State::finished;
}

void AllReduce::wait(std::size_t index, const WaitOptions& options) {
  Bucket& bucket = *buckets_.at(index);
  progress_->wait([&] { return bucket.state == State::finished; }, options,
                  [&](double waited) {
                    return std::make_exception_ptr(StallError(
                        "rank " + std::to_string(progress_->rank()) + " has waited " +
                        std::to_string(static_cast<int>(waited)) + " s for the other replicas: " + describe(index)));
                  });
  bucket.state = State::idle;
}

void AllReduce::completed(std::size_t index) {
  Bucket& bucket = *buckets_[index];
  if (bucket.state == State::gathering) {
    bucket.state = State::finished;
    return;
  }
  const std::size_t bytes = bucket.shard * bytes_of(bucket.dtype);
  sum(bucket.values.data() + static_cast<std::size_t>(rank_) * bytes, bucket.arrived.data(),
      static_cast<std::size_t>(ranks_), bucket.shard, bucket.dtype);
  bucket.state = State::summed;
  gather_in_order();
}

void AllReduce::gather_in_order() {
  while (!started_.empty() && buckets_[started_.front()]->state == State::summed) {
    const std::size_t index = started_.front();
    started_.erase(started_.begin());
    Bucket& bucket = *buckets_[index];
    const int bytes = static_cast<int>(bucket.shard * bytes_of(bucket.dtype));
    MPI_Request request;
    check(MPI_Iallgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, bucket.values.data(), bytes, MPI_BYTE, gather_, &request),
          "MPI_Iallgather", progress_->rank(), describe(index));
    bucket.state = State::gathering;
    progress_->collective(this, index, request);
  }
}

std::string AllReduce::describe(std::size_t index) const {
  return label_ + ", bucket " + std::to_string(index) + " of " + std::to_string(buckets_.size());
}

}  // namespace pipedream
