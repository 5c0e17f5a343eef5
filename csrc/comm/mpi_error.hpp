// Exceptions of the communication core. Their texts are written for users.
#pragma once

#include <mpi.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace pipedream {

struct CoreError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct MpiError : CoreError {  // an MPI call failed
  using CoreError::CoreError;
};
struct MessageError : CoreError {  // a message differs from what was planned
  using CoreError::CoreError;
};
struct StallError : CoreError {  // a peer did not answer within the stall limit
  using CoreError::CoreError;
};

inline std::string text_of(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  return std::string(text, static_cast<std::size_t>(length));
}

// Throws MpiError unless `code` is MPI_SUCCESS. `context` is the purpose and the peer of the call, such as
// "activation of layer 'conv3' from rank 0"; pass a function if the text is expensive to make.
template <typename Context>
void check(int code, const char* call, int rank, const Context& context) {
  if (code == MPI_SUCCESS) return;
  std::string purpose;
  if constexpr (std::is_invocable_v<const Context&>) {
    purpose = context();
  } else {
    purpose = context;
  }
  throw MpiError("rank " + std::to_string(rank) + ": " + call + " failed for " + purpose + ": " + text_of(code));
}

}  // namespace pipedream
