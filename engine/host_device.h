// For functions that device compilers read, too. Such headers use plain functions and no library
// types.
#pragma once

#ifdef __CUDACC__
#define INFEMERAL_HOST_DEVICE __host__ __device__
#else
#define INFEMERAL_HOST_DEVICE
#endif
