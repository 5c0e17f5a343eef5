// What an optimizer does to one number; the same on the host and on a device.
//
// The operations, their order and where they round are those of torch.optim's plain (not fused)
// implementations, so that the bits are the same:
//
//   torch                                        here
//   grad.add(param, alpha=decay)                 multiply_add(param, decay, grad)
//   buffer.mul_(momentum).add_(grad, alpha=a)    multiply_add(grad, a, buffer * momentum)
//   average.lerp_(grad, w)                       multiply_add(w, grad - average, average), w < 0.5
//   square.mul_(beta).addcmul_(grad, grad, a)    multiply_add(a * grad, grad, square * beta)
//   param.addcdiv_(average, denominator, a)      param + a * average / denominator
//
// torch rounds a multiply_add once or twice, depending on the instructions it uses on this CPU: `contracted`
// says which. Scalars are computed in double precision and rounded once, by the caller, as torch does.
#pragma once

#if defined(__CUDACC__)
#define PIPEDREAM_FORMULA __host__ __device__ __forceinline__
#else
// Into the loop that calls it, whatever instruction set that one is compiled for.
#define PIPEDREAM_FORMULA inline __attribute__((always_inline))
#endif

namespace pipedream {

enum class Momentum { none, first, kept };  // no buffer; a buffer that begins as the gradient; one that goes on
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
  float rate;          // negative to descend, over the first bias correction
  float weight_decay;  // decoupled: what is left of the weight, 1 - lr * weight_decay
  float weight1;       // 1 - beta1
  float beta2;
  float weight2;      // 1 - beta2
  float correction2;  // square root of the second bias correction
  float epsilon;
  float sign;  // -1 to maximize
  Decay decay;
};

template <bool contracted>
PIPEDREAM_FORMULA float multiply_add(float a, float b, float c) {
  return contracted ? __builtin_fmaf(a, b, c) : a * b + c;
}

// Returns the new weight.
template <bool contracted, bool decays, Momentum momentum, bool nesterov>
PIPEDREAM_FORMULA float sgd(const Sgd& rule, float weight, float gradient, float* buffer) {
  float step = gradient * rule.sign;
  if (decays) step = multiply_add<contracted>(weight, rule.weight_decay, step);
  if (momentum != Momentum::none) {
    const float kept =
        momentum == Momentum::first ? step : multiply_add<contracted>(step, rule.undampened, *buffer * rule.momentum);
    *buffer = kept;
    step = nesterov ? multiply_add<contracted>(kept, rule.momentum, step) : kept;
  }
  return multiply_add<contracted>(step, rule.rate, weight);
}

// Returns the new weight.
template <bool contracted, Decay decay>
PIPEDREAM_FORMULA float adam(const Adam& rule, float weight, float gradient, float* average, float* square) {
  float step = gradient * rule.sign;
  if (decay == Decay::coupled) step = multiply_add<contracted>(weight, rule.weight_decay, step);
  if (decay == Decay::decoupled) weight *= rule.weight_decay;
  const bool near = rule.weight1 < 0.5f;  // interpolate from the nearer end
  const float mean =
      multiply_add<contracted>(near ? rule.weight1 : rule.weight1 - 1.0f, step - *average, near ? *average : step);
  const float variance = multiply_add<contracted>(rule.weight2 * step, step, *square * rule.beta2);
  *average = mean;
  *square = variance;
  return weight + rule.rate * mean / (__builtin_sqrtf(variance) / rule.correction2 + rule.epsilon);
}

}  // namespace pipedream
