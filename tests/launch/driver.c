/* A CUDA driver without a GPU. Triton's own driver module and launcher are linked to it.

   It reads the cubins that ptxas made (parameters, registers, shared memory, architecture), refuses what the CUDA
   manuals say that a driver refuses, and keeps the last launch instead of running it. What it holds of a launch is
   read by stage.py, where the same structure stands. */

#include "cuda.h"
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_PARAMETERS 64
#define MOST_KERNELS 4
#define MOST_BYTES 2048
#define EM_CUBIN 190
/* tags of .nv.info: a parameter's place, threads, registers, the stack that spilled registers go to */
#define INFO_PARAMETER 0x17
#define INFO_MOST_THREADS 0x05
#define INFO_THREADS 0x10
#define INFO_REGISTERS 0x2f
#define INFO_FRAME 0x11
#define INFO_HAS_VALUE 4

typedef struct {
  int ordinal, offset, size;
} Parameter;

typedef struct {
  char name[160];
  int registers, shared, most_threads, local, dynamic_limit, parameters;
  Parameter parameter[MOST_PARAMETERS];
} Kernel;

typedef struct {
  Kernel kernel[MOST_KERNELS];
  int kernels;
} Module;

typedef struct {
  uint64_t stream;
  uint32_t grid[3], block[3], parameters;
  uint32_t offset[MOST_PARAMETERS], size[MOST_PARAMETERS];
  unsigned char data[MOST_BYTES];
} Launch;

static int major_ = 9, minor_ = 0, multiprocessors = 132, shared_per_block = 232448, shared_per_multiprocessor = 233472;
static char last_error[512] = "no error";
static Launch last;
static long launches;

static CUresult fail(CUresult code, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(last_error, sizeof last_error, format, values);
  va_end(values);
  return code;
}

/* what stage.py calls */
void stand_in_card(int major, int minor, int sms, int per_block, int per_multiprocessor) {
  major_ = major, minor_ = minor, multiprocessors = sms;
  shared_per_block = per_block, shared_per_multiprocessor = per_multiprocessor;
}
long stand_in_launches(void) { return launches; }
const Launch *stand_in_last(void) { return &last; }
const char *stand_in_error(void) { return last_error; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 2; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)(uintptr_t)0x1000; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = last_error; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 16;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)out = pointer;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch ((int)attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = major_; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = minor_; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_per_block; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_per_multiprocessor; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 2619000; break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
  default: *value = 0; return fail(CUDA_ERROR_INVALID_VALUE, "attribute %d of a device is not known here", (int)attribute);
  }
  return CUDA_SUCCESS;
}

/* what ptxas wrote into a cubin about one kernel */
static void read_kernel_info(Kernel *kernel, const unsigned char *info, size_t size) {
  size_t at = 0;
  while (at + 4 <= size) {
    unsigned length = info[at + 2] | info[at + 3] << 8;
    const unsigned char *value = info + at + 4;
    if (info[at] != INFO_HAS_VALUE) {
      at += 4;
      continue;
    }
    if (info[at + 1] == INFO_PARAMETER && length >= 12 && kernel->parameters < MOST_PARAMETERS) {
      uint16_t ordinal, offset;
      uint32_t flags;
      memcpy(&ordinal, value + 4, 2), memcpy(&offset, value + 6, 2), memcpy(&flags, value + 8, 4);
      kernel->parameter[kernel->parameters++] = (Parameter){ordinal, offset, (int)(flags >> 18)};
    } else if ((info[at + 1] == INFO_MOST_THREADS || info[at + 1] == INFO_THREADS) && length >= 4) {
      memcpy(&kernel->most_threads, value, 4);
    }
    at += 4 + length;
  }
}

/* what it wrote about all of them: pairs of a symbol and a value */
static void read_module_info(Module *module, const unsigned char *info, size_t size) {
  size_t at = 0;
  while (at + 4 <= size) {
    unsigned length = info[at + 2] | info[at + 3] << 8;
    if (info[at] == INFO_HAS_VALUE && length >= 8) {
      int value;
      memcpy(&value, info + at + 8, 4);
      for (int i = 0; i < module->kernels; i++) {
        Kernel *kernel = &module->kernel[i];
        if (info[at + 1] == INFO_REGISTERS) kernel->registers = value;
        if (info[at + 1] == INFO_FRAME && kernel->local < value) kernel->local = value;
      }
    }
    at += info[at] == INFO_HAS_VALUE ? 4 + length : 4;
  }
}

static int by_ordinal(const void *left, const void *right) {
  return ((const Parameter *)left)->ordinal - ((const Parameter *)right)->ordinal;
}

CUresult cuModuleLoadData(CUmodule *out, const void *image) {
  const unsigned char *base = image;
  const Elf64_Ehdr *header = image;
  if (memcmp(base, ELFMAG, 4) || header->e_machine != EM_CUBIN) return fail(CUDA_ERROR_INVALID_IMAGE, "no cubin");
  int architecture = base[EI_ABIVERSION] >= 8 ? (header->e_flags >> 8) & 0xff : header->e_flags & 0xff;
  if (architecture != major_ * 10 + minor_)
    return fail(CUDA_ERROR_NO_BINARY_FOR_GPU, "a cubin for sm_%d loaded on sm_%d%d", architecture, major_, minor_);
  Module *module = calloc(1, sizeof(Module));
  const Elf64_Shdr *section = (const void *)(base + header->e_shoff);
  const char *names = (const char *)base + section[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; i++) {
    const char *name = names + section[i].sh_name;
    if (strncmp(name, ".text.", 6) || module->kernels == MOST_KERNELS) continue;
    snprintf(module->kernel[module->kernels++].name, sizeof module->kernel->name, "%s", name + 6);
  }
  for (int i = 0; i < header->e_shnum; i++) {
    const char *name = names + section[i].sh_name;
    const unsigned char *content = base + section[i].sh_offset;
    if (!strcmp(name, ".nv.info")) read_module_info(module, content, section[i].sh_size);
    for (int k = 0; k < module->kernels; k++) {
      Kernel *kernel = &module->kernel[k];
      if (!strncmp(name, ".nv.info.", 9) && !strcmp(name + 9, kernel->name))
        read_kernel_info(kernel, content, section[i].sh_size);
      /* the KiB that a driver reserves on newer GPUs is counted there, and left out of the limits here */
      if (!strncmp(name, ".nv.shared.", 11) && !strcmp(name + 11, kernel->name) && section[i].sh_size > 1024)
        kernel->shared = (int)section[i].sh_size - 1024;
    }
  }
  for (int k = 0; k < module->kernels; k++)
    qsort(module->kernel[k].parameter, module->kernel[k].parameters, sizeof(Parameter), by_ordinal);
  *out = (CUmodule)module;
  return module->kernels ? CUDA_SUCCESS : fail(CUDA_ERROR_INVALID_IMAGE, "a cubin without a kernel");
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule handle, const char *name) {
  Module *module = (Module *)handle;
  for (int i = 0; i < module->kernels; i++)
    if (!strcmp(module->kernel[i].name, name)) {
      *function = (CUfunction)&module->kernel[i];
      return CUDA_SUCCESS;
    }
  return fail(CUDA_ERROR_NOT_FOUND, "no kernel %s", name);
}

/* registers are given to a warp 256 at a time, to warps four at a time */
static int most_threads(const Kernel *kernel) {
  int per_warp = (kernel->registers * 32 + 255) / 256 * 256, warps = per_warp ? 65536 / per_warp : 32;
  int threads = (warps - warps % 4) * 32;
  threads = threads > 1024 ? 1024 : threads;
  return kernel->most_threads && kernel->most_threads < threads ? kernel->most_threads : threads;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  const Kernel *kernel = (const Kernel *)function;
  switch ((int)attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel->registers; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = kernel->local; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = kernel->shared; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = most_threads(kernel); break;
  default: return fail(CUDA_ERROR_INVALID_VALUE, "attribute %d of a kernel is not known here", (int)attribute);
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Kernel *kernel = (Kernel *)function;
  /* more shared memory than the manuals state, which newer drivers may give: not here */
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return fail(CUDA_ERROR_INVALID_VALUE, "attribute %d of a kernel can't be set here", (int)attribute);
  if (value + kernel->shared > shared_per_block)
    return fail(CUDA_ERROR_INVALID_VALUE, "%d bytes of shared memory, the device has %d", value + kernel->shared,
                shared_per_block);
  kernel->dynamic_limit = value;
  return CUDA_SUCCESS;
}

/* a tensor map as it is kept here; Triton may clear bit 21 of the second word, so that stands alone */
typedef struct {
  uint64_t magic, word, address, sizes[2], stride;
} Map;

static unsigned element_bytes(CUtensorMapDataType type) {
  if (type == CU_TENSOR_MAP_DATA_TYPE_UINT8) return 1;
  if (type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
      type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16)
    return 2;
  return 4;
}

/* the driver API's manual, cuTensorMapEncodeTiled; eight bytes an element and interleaved layouts aren't used */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const CUresult invalid = CUDA_ERROR_INVALID_VALUE;
  const unsigned swizzled[] = {0, 32, 64, 128}, bytes = element_bytes(type), inner = box[0] * bytes;
  if (major_ < 9) return fail(CUDA_ERROR_NOT_SUPPORTED, "tensor maps need sm_90, this is sm_%d%d", major_, minor_);
  if ((uintptr_t)map % 64) return fail(invalid, "the map is not aligned to 64 bytes");
  if (rank < 1 || rank > 2) return fail(invalid, "a tensor map of rank %u", rank);
  if (!address || (uintptr_t)address % 16) return fail(invalid, "address %p is no multiple of 16", address);
  for (unsigned i = 0; i < rank; i++) {
    if (!sizes[i] || sizes[i] > 1ull << 32) return fail(invalid, "a size of %llu", (unsigned long long)sizes[i]);
    if (!box[i] || box[i] > 256) return fail(invalid, "a box of %u elements", box[i]);
    if (!steps[i] || steps[i] > 8) return fail(invalid, "an element stride of %u", steps[i]);
  }
  if (rank > 1 && (strides[0] % 16 || strides[0] >= 1ull << 40))
    return fail(invalid, "a stride of %llu bytes", (unsigned long long)strides[0]);
  if (rank > 1 && strides[0] < sizes[0] * bytes) return fail(invalid, "rows overlap");
  if (inner % 16) return fail(invalid, "an inner box of %u bytes", inner);
  if (swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return fail(invalid, "swizzle %d is not known here", (int)swizzle);
  if (swizzled[swizzle] && inner > swizzled[swizzle])
    return fail(invalid, "an inner box of %u bytes, swizzled by %u", inner, swizzled[swizzle]);
  Map kept = {0x70614d72736e6554ull, 1ull << 21, (uint64_t)(uintptr_t)address, {sizes[0], rank > 1 ? sizes[1] : 1},
              rank > 1 ? strides[0] : 0};
  memset(map, 0, sizeof *map);
  memcpy(map, &kept, sizeof kept);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  const Kernel *kernel = (const Kernel *)function;
  const CUresult invalid = CUDA_ERROR_INVALID_VALUE;
  uint32_t grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  uint32_t block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  int threads = (int)(block[0] * block[1] * block[2]);
  int limit = kernel->dynamic_limit ? kernel->dynamic_limit : 49152 - kernel->shared;
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535)
    return fail(invalid, "a grid of %u x %u x %u", grid[0], grid[1], grid[2]);
  if (threads < 1 || threads > most_threads(kernel))
    return fail(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%d threads of %d registers", threads, kernel->registers);
  if ((int)config->sharedMemBytes > limit)
    return fail(invalid, "%u bytes of shared memory, allowed are %d", config->sharedMemBytes, limit);
  if (!kernel->parameters) return fail(invalid, "the cubin tells no parameters");
  memcpy(last.grid, grid, sizeof grid), memcpy(last.block, block, sizeof block);
  last.stream = (uint64_t)(uintptr_t)config->hStream, last.parameters = kernel->parameters;
  for (int i = 0; i < kernel->parameters; i++) {
    const Parameter *parameter = &kernel->parameter[i];
    if (parameter->offset + parameter->size > MOST_BYTES) return fail(invalid, "more than %d bytes", MOST_BYTES);
    last.offset[i] = parameter->offset, last.size[i] = parameter->size;
    memcpy(last.data + parameter->offset, parameters[i], parameter->size);
  }
  launches++;
  return CUDA_SUCCESS;
}
