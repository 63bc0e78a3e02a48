// Stands in for libcuda.so.1 where there is no GPU: a "device" whose modules are shared libraries of kernels that
// nvrtc.cpp has built for the CPU, and whose memory is the process's own. Only what laps calls.

#include <dlfcn.h>
#include <elf.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

typedef int (*Launch)(unsigned, unsigned, unsigned, size_t, void**);

static int setting(const char* name, int otherwise) {
    const char* value = getenv(name);
    return value && *value ? atoi(value) : otherwise;
}

extern "C" {

// What laps knows this library by.
int laps_emulated_driver = 1;

int cuInit(unsigned) { return setting("LAPS_EMULATOR_INIT", 0); }

int cuGetErrorName(int error, const char** name) {
    *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_UNKNOWN";
    return 0;
}

int cuGetErrorString(int error, const char** text) {
    *text = error == 2 ? "out of memory" : error == 100 ? "no CUDA-capable device is detected" : "unknown error";
    return 0;
}

int cuDriverGetVersion(int* version) {
    *version = 13000;
    return 0;
}

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal < 2 ? 0 : 101;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    const int architecture = setting("LAPS_EMULATOR_ARCHITECTURE", 90);
    switch (attribute) {
    case 16: *value = setting("LAPS_EMULATOR_MULTIPROCESSORS", 4); return 0;
    case 75: *value = architecture / 10; return 0;
    case 76: *value = architecture % 10; return 0;
    case 97: *value = setting("LAPS_EMULATOR_SHARED_MEMORY", 232448); return 0;
    }
    return 1;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = (void*)(size_t)(device + 1);
    return 0;
}
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void** context) {
    *context = nullptr;
    return 0;
}

int cuModuleLoadData(void** module, const void* image) {
    const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
    if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return 200;
    const size_t size = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
    char path[] = "/tmp/laps-emulated-XXXXXX";
    const int file = mkstemp(path);
    if (file < 0) return 999;
    size_t written = 0;
    while (written < size) {
        const ssize_t step = write(file, (const char*)image + written, size - written);
        if (step <= 0) break;
        written += (size_t)step;
    }
    close(file);
    *module = written == size ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!*module) fprintf(stderr, "emulator: %s\n", dlerror());
    unlink(path);
    return *module ? 0 : 200;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = dlsym(module, (std::string(name) + "_emulated").c_str());
    return *function ? 0 : 500;
}

int cuFuncSetAttribute(void*, int, int) { return 0; }

int cuLaunchKernel(void* function, unsigned bx, unsigned by, unsigned, unsigned tx, unsigned, unsigned, unsigned shared,
    void*, void** parameters, void**) {
    if (int error = setting("LAPS_EMULATOR_LAUNCH", 0)) return error;
    if ((int)shared > setting("LAPS_EMULATOR_SHARED_MEMORY", 232448) || tx > 1024 || by > 65535) return 1;
    return ((Launch)function)(bx, by, tx, shared, parameters) ? 719 : 0;
}
}
