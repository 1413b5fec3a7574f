// Products with Q4_K, Q5_K and Q6_K by SMMLA, and by SDOT with a single column
#include "kernels/neon_products.h"

const cpu_quantized cpu_quantized_neoni8mm = NEON_PRODUCTS;
