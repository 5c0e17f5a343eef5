// The update formulas of the optimizers for one number, on the host and on a device.
//
// The operations, their order and their roundings are those of torch.optim's plain (not fused) implementations,
// so the results are the same bits:
//
//   torch                                        here
//   grad.add(param, alpha=decay)                 multiply_add(param, decay, grad)
//   buffer.mul_(momentum).add_(grad, alpha=a)    multiply_add(grad, a, buffer * momentum)
//   average.lerp_(grad, w)                       multiply_add(w, grad - average, average), w < 0.5
//   square.mul_(beta).addcmul_(grad, grad, a)    multiply_add(a * grad, grad, square * beta)
//   param.addcdiv_(average, denominator, a)      param + a * average / denominator
//
// torch rounds a multiply_add once with FMA instructions and twice without, depending on the CPU: `fma` says
// which. The caller computes scalars in double precision and rounds them once, as torch does.
#pragma once

#if defined(__CUDACC__)
#define PIPEDREAM_FORMULA __host__ __device__ __forceinline__
#else
// Inlined into the calling loop, so that it is compiled for the loop's instruction set.
#define PIPEDREAM_FORMULA inline __attribute__((always_inline))
#endif

namespace pipedream {

enum class Momentum { none, first, kept };  // no buffer; a new buffer, which starts as the gradient; an existing one
enum class Decay { none, coupled, decoupled };

struct Sgd {
  float rate;  // negative to descend
  float weight_decay;
  float momentum;
  float undampened;  // 1 - dampening
  float sign;        // -1 to maximize
  Momentum buffer;
  bool decays;
  bool nesterov;
};

struct Adam {
  float rate;          // negative to descend, divided by the first bias correction
  float weight_decay;  // if decoupled: the factor of the weight, 1 - lr * weight_decay
  float weight1;       // 1 - beta1
  float beta2;
  float weight2;      // 1 - beta2
  float correction2;  // square root of the second bias correction
  float epsilon;
  float sign;  // -1 to maximize
  Decay decay;
};

template <bool fma>
PIPEDREAM_FORMULA float multiply_add(float a, float b, float c) {
  return fma ? __builtin_fmaf(a, b, c) : a * b + c;
}

// Returns the new weight.
template <bool fma, bool decays, Momentum momentum, bool nesterov>
PIPEDREAM_FORMULA float sgd(const Sgd& rule, float weight, float gradient, float* buffer) {
  float step = gradient * rule.sign;
  if (decays) step = multiply_add<fma>(weight, rule.weight_decay, step);
  if (momentum != Momentum::none) {
    const float kept =
        momentum == Momentum::first ? step : multiply_add<fma>(step, rule.undampened, *buffer * rule.momentum);
    *buffer = kept;
    step = nesterov ? multiply_add<fma>(kept, rule.momentum, step) : kept;
  }
  return multiply_add<fma>(step, rule.rate, weight);
}

// Returns the new weight.
template <bool fma, Decay decay>
PIPEDREAM_FORMULA float adam(const Adam& rule, float weight, float gradient, float* average, float* square) {
  float step = gradient * rule.sign;
  if (decay == Decay::coupled) step = multiply_add<fma>(weight, rule.weight_decay, step);
  if (decay == Decay::decoupled) weight *= rule.weight_decay;
  const bool near = rule.weight1 < 0.5f;  // interpolate from the nearer end
  const float mean =
      multiply_add<fma>(near ? rule.weight1 : rule.weight1 - 1.0f, step - *average, near ? *average : step);
  const float variance = multiply_add<fma>(rule.weight2 * step, step, *square * rule.beta2);
  *average = mean;
  *square = variance;
  return weight + rule.rate * mean / (__builtin_sqrtf(variance) / rule.correction2 + rule.epsilon);
}

}  // namespace pipedream
