# cmake --install: the libraries, their public headers, the programs and a package configuration, so
# that find_package(infemeral CONFIG) gives infemeral::engine, infemeral::cpu and infemeral::net.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/infemeral)
get_property(rooms GLOBAL PROPERTY INFEMERAL_ROOMS)
install(TARGETS ${rooms} EXPORT infemeralTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT infemeralTargets NAMESPACE infemeral:: DESTINATION ${package_dir})

foreach(folder engine cpu net)
  install(DIRECTORY ${PROJECT_SOURCE_DIR}/${folder}
          DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/infemeral FILES_MATCHING PATTERN "*.h")
endforeach()

write_basic_package_version_file(${PROJECT_BINARY_DIR}/infemeralConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_SOURCE_DIR}/cmake/infemeralConfig.cmake
              ${PROJECT_SOURCE_DIR}/cmake/Dependencies.cmake
              ${PROJECT_BINARY_DIR}/infemeralConfigVersion.cmake
        DESTINATION ${package_dir})
