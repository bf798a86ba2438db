# cmake -DSOURCE_DIR=... -DOUTPUT=... -P revision.cmake
# Writes what the sources are right now, at every build, so that no report names another commit than
# the one that ran. The file changes, and with it what depends on it, only with the revision.
execute_process(COMMAND git describe --always --dirty --abbrev=12
                WORKING_DIRECTORY ${SOURCE_DIR}
                OUTPUT_VARIABLE revision OUTPUT_STRIP_TRAILING_WHITESPACE
                RESULT_VARIABLE failed ERROR_QUIET)
if(failed)
  set(revision unknown)
endif()
file(CONFIGURE OUTPUT ${OUTPUT} CONTENT [[
#include "engine/version.h"

const char infemeral::kGitRevision[] = "@revision@";
]] @ONLY)
