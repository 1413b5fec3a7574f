// Products with Q4_K, Q5_K and Q6_K by SDOT
#include "kernels/neon_products.h"

const cpu_quantized cpu_quantized_neondot = NEON_PRODUCTS;
