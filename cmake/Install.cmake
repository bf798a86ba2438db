# cmake --install: the libraries, their public headers, the programs and a package configuration, so
# that find_package(infemeral CONFIG) gives infemeral::engine, infemeral::cpu, infemeral::net and, where
# it was built, infemeral::cuda.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/infemeral)
get_property(rooms GLOBAL PROPERTY INFEMERAL_ROOMS)
install(TARGETS ${rooms} EXPORT infemeralTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT infemeralTargets NAMESPACE infemeral:: DESTINATION ${package_dir})

# Public headers only: what an application includes, and what those include.
set(public_headers
  engine/backend.h engine/body.h engine/certified_bound.h engine/certified_head.h engine/chat_template.h engine/chat_template_formats.h engine/client_folder.h engine/cloak.h engine/cloak_noise.h engine/draft.h
  engine/fingerprint.h engine/float16.h engine/generation_config.h engine/host_device.h engine/link.h engine/log.h
  engine/metrics.h engine/model_config.h engine/pipeline.h engine/report.h engine/retry.h engine/safetensors.h
  engine/sampling.h engine/subset_head.h engine/text_generation.h engine/token_subset.h
  engine/tokenizer.h engine/version.h engine/wire.h
  cpu/body.h cpu/client_backend.h cpu/prepare.h
  net/aes_gcm.h net/body_server.h net/client_link.h net/identity.h net/noise.h net/secret.h net/tls.h)
if(INFEMERAL_CUDA)
  list(APPEND public_headers kernels/client_backend.h)
endif()
foreach(header ${public_headers})
  get_filename_component(folder ${header} DIRECTORY)
  install(FILES ${PROJECT_SOURCE_DIR}/${header}
          DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/infemeral/${folder})
endforeach()

write_basic_package_version_file(${PROJECT_BINARY_DIR}/infemeralConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
configure_file(${PROJECT_SOURCE_DIR}/cmake/infemeralConfig.cmake.in
               ${PROJECT_BINARY_DIR}/infemeralConfig.cmake @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/infemeralConfig.cmake
              ${PROJECT_SOURCE_DIR}/cmake/Dependencies.cmake
              ${PROJECT_BINARY_DIR}/infemeralConfigVersion.cmake
        DESTINATION ${package_dir})
