// The kernel's source with its own instructions for tiles, see amx_trapped.c
#define MLLAMA_AMX_EMULATED
#define MLLAMA_AMX_TRAPPED
#define cpu_bf16_amx cpu_bf16_amx_trapped
#include "kernels/amxbf16.c"
