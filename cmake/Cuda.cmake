# INFEMERAL_CUDA: whether the CUDA backend is built. On where nvcc is found; a build without it is
# complete but for `--backend cuda`.
include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX} AND EXISTS /usr/local/cuda/bin/nvcc)
  set(CMAKE_CUDA_COMPILER /usr/local/cuda/bin/nvcc)  # where NVIDIA's packages put it, off the PATH
endif()
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  set(cuda_found ON)
else()
  set(cuda_found OFF)
endif()
option(INFEMERAL_CUDA "Build the CUDA backend" ${cuda_found})

if(INFEMERAL_CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "INFEMERAL_CUDA is on and there is no nvcc: install the CUDA Toolkit, or "
                        "name the compiler with -DCMAKE_CUDA_COMPILER=...")
  endif()
  # Turing to Hopper as machine code (9.0a: with instructions that only Hopper has), and PTX for
  # what comes after.
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90a-real 90-virtual)
  endif()
  if(CCACHE_PROGRAM AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  endif()
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # nvcc 12 has it; CMake 3.25 does not know that
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  find_package(CUDAToolkit 12.4 REQUIRED)
else()
  message(STATUS "CUDA backend: not built (no nvcc, or INFEMERAL_CUDA is off)")
endif()
