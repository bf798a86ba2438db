// What a program with a bug does to its device.
#pragma once

namespace infemeral {

// Leaves the current device with an error that every later call reports.
void break_device();

}  // namespace infemeral
