// Preloaded (LD_PRELOAD), it stands before ggml's CPU backend: ggml's registration of all devices fails, as it does
// when a driver throws there. MLLAMA_TEST_REGISTRY: "vulkan", as long as Vulkan is not disabled; "always".
// MLLAMA_TEST_GGML_CPU: libggml-cpu.
#include "ggml-backend.h"

#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <stdexcept>

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_cpu_reg(void) {
    const char * when = std::getenv("MLLAMA_TEST_REGISTRY");
    if (when && (std::strcmp(when, "always") == 0 || !std::getenv("GGML_DISABLE_VULKAN"))) {
        throw std::runtime_error("Registry: no luck");
    }
    void * library = dlopen(std::getenv("MLLAMA_TEST_GGML_CPU"), RTLD_NOW);
    return reinterpret_cast<ggml_backend_reg_t (*)()>(dlsym(library, "ggml_backend_cpu_reg"))();
}
