// The kernel's source with its own instructions for tiles, see amx_trapped.c
#define MLLAMA_AMX_EMULATED
#define MLLAMA_AMX_TRAPPED
#define cpu_quantized_amx_32 cpu_quantized_amx_32_trapped
#include "kernels/amxint8_32.c"
