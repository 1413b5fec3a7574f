// The kernel's source over emulated tiles
#define MLLAMA_AMX_EMULATED
#define cpu_quantized_amx cpu_quantized_amx_emulated
#include "kernels/amxint8.c"
