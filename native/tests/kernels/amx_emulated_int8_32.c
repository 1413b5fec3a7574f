// The kernel's source over emulated tiles
#define MLLAMA_AMX_EMULATED
#define cpu_quantized_amx_32 cpu_quantized_amx_32_emulated
#include "kernels/amxint8_32.c"
