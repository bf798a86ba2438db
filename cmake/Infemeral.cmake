# Settings that every target of the project shares, and the helper that makes a room's library.

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

# Warnings are errors for our own code only: never for a program that embeds the library.
add_library(infemeral_build_options INTERFACE)
target_compile_options(infemeral_build_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wshadow;-Wno-missing-field-initializers;-Werror;-fno-math-errno;-ffp-contract=off>
  $<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings;--expt-relaxed-constexpr;-Xcompiler=-Wall,-Wextra,-Werror>)
if(INFEMERAL_SANITIZE)
  target_compile_options(infemeral_build_options INTERFACE
    -fsanitize=${INFEMERAL_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  target_link_options(infemeral_build_options INTERFACE -fsanitize=${INFEMERAL_SANITIZE})
  if(INFEMERAL_SANITIZE MATCHES address)
    # What its reports show. More takes a fifth longer; ThreadSanitizer's suppressions need it, to
    # know inlined functions by their whole names.
    target_compile_options(infemeral_build_options INTERFACE
      $<$<CXX_COMPILER_ID:Clang>:-gline-tables-only>)
  endif()
endif()
if(INFEMERAL_FUZZ)
  # Coverage feedback for the library code that the fuzz targets reach.
  target_compile_options(infemeral_build_options INTERFACE -fsanitize=fuzzer-no-link)
endif()

# infemeral_room(NAME SOURCES... ): the static library of one folder, exported as infemeral::NAME.
function(infemeral_room name)
  add_library(infemeral_${name} STATIC ${ARGN})
  add_library(infemeral::${name} ALIAS infemeral_${name})
  set_target_properties(infemeral_${name} PROPERTIES EXPORT_NAME ${name})
  target_include_directories(infemeral_${name} PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>
    $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/infemeral>)
  target_compile_features(infemeral_${name} PUBLIC cxx_std_20)
  target_link_libraries(infemeral_${name} PRIVATE $<BUILD_INTERFACE:infemeral_build_options>)
  set_property(GLOBAL APPEND PROPERTY INFEMERAL_ROOMS infemeral_${name})
endfunction()

# infemeral_compile_quickly(EXCEPT...): this folder's targets without optimisation, in a build with
# AddressSanitizer. For tests and programs that leave the computing to the rooms: optimising them was a
# third of such a build's time. Not with ThreadSanitizer, to which unoptimised code shows other races
# of libraries that are built without it.
function(infemeral_compile_quickly)
  if(NOT INFEMERAL_SANITIZE MATCHES address)
    return()
  endif()
  get_property(targets DIRECTORY PROPERTY BUILDSYSTEM_TARGETS)
  list(REMOVE_ITEM targets ${ARGN})
  foreach(target ${targets})
    get_target_property(type ${target} TYPE)
    if(NOT type MATCHES "INTERFACE|UTILITY")
      target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O0>)
    endif()
  endforeach()
endfunction()
