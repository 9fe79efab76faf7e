// Memory of others that the GPU reads and writes by itself, see pinning.py.
#include "pinning.h"

#include <cuda_runtime.h>
#include <sys/mman.h>

#include "address.h"
#include "check.h"

namespace expertd {
namespace {

// In a thread of their own, whose current device is theirs to set.
void pin(int device, Address address, size_t num_bytes) {
#ifdef MADV_POPULATE_WRITE
  // CUDA keeps everybody else's calls waiting while it pins, and to make pages that nobody has written to yet takes ten
  // times as long. Where it fails, so will what follows, and say why.
  (void)madvise(pointer<void>(address), num_bytes, MADV_POPULATE_WRITE);
#endif
  check_cuda(cudaSetDevice(device), "choosing a CUDA device");
  check_cuda(cudaHostRegister(pointer<void>(address), num_bytes, cudaHostRegisterDefault), "pinning shared memory");
}

void unpin(int device, Address address) {
  check_cuda(cudaSetDevice(device), "choosing a CUDA device");
  check_cuda(cudaHostUnregister(pointer<void>(address)), "unpinning shared memory");
}

}  // namespace

void bind_pinning(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("pin", &pin, pybind11::arg("device"), pybind11::arg("address"), pybind11::arg("num_bytes"), release());
  m.def("unpin", &unpin, pybind11::arg("device"), pybind11::arg("address"), release());
}

}  // namespace expertd
