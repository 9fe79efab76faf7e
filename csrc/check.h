// Errors of the CUDA runtime as C++ exceptions, which the binding turns into RuntimeError.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace expertd {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // clear what can be cleared, so that the next call reports its own error
  std::string message = std::string(what) + " failed: " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    message += " (these kernels need a Hopper GPU, compute capability 9.0; use the torch backend on others)";
  } else if (status == cudaErrorInsufficientDriver) {
    message += " (update the NVIDIA driver, or use the CPU backend)";
  } else if (status == cudaErrorIllegalAddress || status == cudaErrorLaunchFailure || status == cudaErrorAssert) {
    message += " (the CUDA context of this process is lost: restart it; compute-sanitizer finds the access)";
  }
  throw std::runtime_error(message);
}

// For arguments of the launchers: what a caller can get wrong, said as an exception and never as garbage.
inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace expertd
