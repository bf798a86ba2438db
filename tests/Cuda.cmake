# Tests of the CUDA backend. They need a GPU to run; without one they say that they were skipped.
if(NOT INFEMERAL_CUDA)
  return()
endif()

target_link_libraries(backend_parity_test PRIVATE infemeral::cuda)
target_compile_definitions(backend_parity_test PRIVATE INFEMERAL_HAVE_CUDA)
add_test(NAME backend_parity_cuda COMMAND backend_parity_test "*- Cuda")

infemeral_test(cuda_head infemeral::cuda)
infemeral_test(cuda_token infemeral::cuda infemeral_client_fixture)
# The functions that the test counts, which must be the same ones.
foreach(function
    cudaMalloc cudaMallocAsync cudaMallocHost cudaHostAlloc cudaFree cudaFreeHost
    cudaMemcpy cudaMemcpyAsync cudaMemcpy2DAsync cudaMemset cudaMemsetAsync
    cudaStreamSynchronize cudaDeviceSynchronize cudaEventSynchronize
    cudaGraphInstantiate cudaGraphLaunch cudaLaunchKernel cudaLaunchKernelExC)
  target_link_options(cuda_token_test PRIVATE -Wl,--wrap=${function})
endforeach()

set_tests_properties(backend_parity_cuda cuda_head cuda_token PROPERTIES
  SKIP_REGULAR_EXPRESSION "skipped:")
