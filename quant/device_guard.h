// Errors of the device leave the quantiser's *_cuda.cpp files as Error that says what was being done.
#pragma once
#include <string>

#include "kernels/cuda_check.h"
#include "runtime/error.h"

namespace q4s {

template <typename Fn>
auto device_guarded(const char* what, const Fn& fn) {
  try {
    return fn();
  } catch (const CudaError& e) {
    const bool memory = e.code == cudaErrorMemoryAllocation;
    throw Error(memory ? ErrorKind::kResource : ErrorKind::kRuntime,
                std::string("GPU: ") + what + ": " + e.what());
  } catch (const Error&) {
    throw;
  } catch (const std::runtime_error& e) {
    throw Error(ErrorKind::kRuntime, std::string("GPU: ") + what + ": " + e.what());
  }
}

}  // namespace q4s
