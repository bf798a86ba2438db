// engine_bench's prompts: fixed and public. A change makes older baselines incomparable: raise
// kPromptSet with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace infemeral {

inline constexpr std::uint64_t kPromptSet = 1;

// All are cut to the same length: of times that belong to several lengths, a median says little.
inline constexpr std::size_t kPromptTokens = 16;

inline constexpr std::string_view kPrompts[] = {
    "The capital of France lies on the river Seine, and on a clear evening in spring its bridges "
    "and "
    "boulevards are full of people who",
    "Once upon a time, in a village at the foot of a mountain, there lived a clockmaker who wound "
    "every clock of the valley himself and",
    "A list of the planets of the solar system, from the sun outwards, with a remark about the "
    "colour and the size of each one of them:",
    "To make a loaf of bread you need flour, water, salt and a little patience, since the dough "
    "has "
    "to rest for a while before",
};

// Repeated until the prompt of the prefill case is long enough.
inline constexpr std::string_view kLongPrompt =
    "The harbour wakes before the town does. Gulls argue over the first nets, ropes creak, and the "
    "smell of tar and cold salt water drifts up the lanes. By six the boats that left in the dark "
    "are back, riding low, and the scales on the quay begin to swing. ";

}  // namespace infemeral
