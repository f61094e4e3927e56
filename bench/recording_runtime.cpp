// In place of the CUDA runtime: writes launches down; see cuda_launches.py. Names and types are those that nvcc's host
// code declares (crt/host_runtime.h); CUDA 12 calls cudaLaunchKernel, CUDA 13 __cudaGetKernel and __cudaLaunchKernel.
#include <cstddef>
#include <map>
struct dim3 { unsigned x, y, z; };
using Report = void (*)(const char*, dim3, dim3, size_t, void**);
static std::map<const void*, const char*>& names() { static std::map<const void*, const char*> all; return all; }
static Report report = nullptr;
static struct { dim3 grid, block; size_t shared; } pushed;
static int launch(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared) {
  if (report) report(names()[kernel], grid, block, shared, arguments);
  return 0;
}
extern "C" {
__attribute__((visibility("default"))) void mimdet_report(Report to) { report = to; }
void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  names()[kernel] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void*) {
  pushed = {grid, block, shared};
  return 0;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid; *block = pushed.block; *shared = pushed.shared; *static_cast<void**>(stream) = nullptr;
  return 0;
}
int __cudaGetKernel(const void** handle, const void* kernel) { *handle = kernel; return 0; }
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void*) {
  return launch(kernel, grid, block, arguments, shared);
}
int cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void*) {
  return launch(kernel, grid, block, arguments, shared);
}
int cudaGetLastError() { return 0; }
int cudaFuncSetAttribute(const void*, int, int) { return 0; }
}
