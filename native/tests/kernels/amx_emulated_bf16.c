// The kernel's source over emulated tiles
#define MLLAMA_AMX_EMULATED
#define cpu_bf16_amx cpu_bf16_amx_emulated
#include "kernels/amxbf16.c"
