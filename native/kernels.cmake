# The CPU kernels: a file for each set of instructions, which tables.c finds out about when it runs; on other processors
# portable.c alone.
include(CheckCCompilerFlag)
include(CheckCSourceCompiles)

set(MLLAMA_KERNELS_DIR "${CMAKE_CURRENT_LIST_DIR}/src/kernels")

function(kernel_with target name) # and the flags that it may use
  target_sources(${target} PRIVATE "${MLLAMA_KERNELS_DIR}/${name}.c")
  set_source_files_properties("${MLLAMA_KERNELS_DIR}/${name}.c" PROPERTIES COMPILE_OPTIONS "${ARGN}")
endfunction()

function(add_kernels target)
  foreach(name tables choose attention cache_attention linear quantized elementwise portable)
    target_sources(${target} PRIVATE "${MLLAMA_KERNELS_DIR}/${name}.c")
  endforeach()
  check_c_source_compiles("
#if !defined(__aarch64__) || defined(__AARCH64EB__)
#error other
#endif
int main(void) { return 0; }" MLLAMA_ARM64)
  check_c_compiler_flag(-march=armv8.2-a+bf16+dotprod+i8mm MLLAMA_ARM_FLAGS) # GCC 10 and later
  if(MLLAMA_ARM64 AND MLLAMA_ARM_FLAGS)
    kernel_with(${target} neon)
    kernel_with(${target} neonbf16 -march=armv8.2-a+bf16)
    kernel_with(${target} neondot -march=armv8.2-a+dotprod)
    kernel_with(${target} neoni8mm -march=armv8.2-a+dotprod+i8mm)
    target_compile_definitions(${target} PRIVATE MLLAMA_NEON)
  endif()
  check_c_source_compiles("
#ifndef __x86_64__
#error other
#endif
int main(void) { return 0; }" MLLAMA_X86_64)
  if(MLLAMA_X86_64)
    kernel_with(${target} avx2 -mavx2 -mfma -mf16c)
    kernel_with(${target} avx2products -mavx2 -mfma -mf16c)
    check_c_compiler_flag(-mavxvnni MLLAMA_AVXVNNI) # GCC 11 and later
    if(MLLAMA_AVXVNNI)
      kernel_with(${target} avxvnni -mavx2 -mfma -mf16c -mavxvnni)
      target_compile_definitions(${target} PRIVATE MLLAMA_AVXVNNI)
    endif()
    kernel_with(${target} avx512 -mavx512f)
    kernel_with(${target} vnni -mavx512f -mavx512bw -mavx512vnni -mfma -mf16c)
    kernel_with(${target} vnni_32 -mavx512f -mavx512bw -mavx512vnni -mfma -mf16c)
    check_c_compiler_flag(-mavx512bf16 MLLAMA_AVX512BF16) # GCC 10 and later
    if(MLLAMA_AVX512BF16)
      kernel_with(${target} avx512bf16 -mavx512f -mavx512dq -mavx512bf16)
      target_compile_definitions(${target} PRIVATE MLLAMA_AVX512BF16)
      # binutils 2.34 and GCC 12, or Clang; the request for tiles is Linux's
      check_c_source_compiles("
#ifndef __linux__
#error other
#endif
typedef int four __attribute__((vector_size(16)));
int main(void) {
    four x = { 0 };
    x = __builtin_shufflevector(x, x, 0, 4, 1, 5);
    __asm__ volatile(\"tdpbf16ps %tmm0, %tmm1, %tmm2; tdpbssd %tmm0, %tmm1, %tmm2; tdpbsud %tmm0, %tmm1, %tmm2\");
    return x[0];
}" MLLAMA_AMX)
      if(MLLAMA_AMX)
        kernel_with(${target} amx)
        kernel_with(${target} amxbf16 -mavx512f -mavx512dq -mavx512bf16 -mfma -mprfchw)
        kernel_with(${target} amxint8 -mavx512f -mavx512bw -mavx512vnni -mfma -mf16c)
        kernel_with(${target} amxint8_32 -mavx512f -mavx512bw -mfma -mf16c)
        target_compile_definitions(${target} PRIVATE MLLAMA_AMX)
      endif()
    endif()
  endif()
endfunction()
