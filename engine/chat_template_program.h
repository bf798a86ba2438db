// A chat template's Jinja program, cut into what it does: for telling known formats from those that
// only resemble them, not for running it.
//
// Left out is what a chat of plain system, user and assistant messages never reaches: branches for
// tools, documents, reasoning that comes in a field of its own, and options that nobody sets. White
// space is Hugging Face's (trim_blocks, lstrip_blocks).
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace infemeral {

// Expressions are written in one way: without white space that means nothing, a["b"] as a.b,
// strings in double quotes with \n, \" and \\ escaped.
struct TemplateStep {
  enum class Kind {
    kText,    // writes `text`, unescaped; neighbours are one step
    kOutput,  // writes the expression `text`, a sum's terms one by one
    kSet,     // name=expression
    kFor,     // name in expression
    kIf,      // a condition
    kElif,    // likewise
    kMark,    // else, endif, endfor, generation, endgeneration
  };
  Kind kind;
  std::string text;
  std::string guard;  // the innermost if around it; "not C" behind the else of if C
  bool in_loop;
  std::vector<std::string> literals;  // the strings in a condition or a set's expression
};

// Unimplemented, with what it is, for what this does not read: macros, includes, unusual escapes.
absl::StatusOr<std::vector<TemplateStep>> read_template_program(std::string_view jinja);

// All steps in one line, equal for programs that differ in spelling alone. What raise_exception()
// would say is left out.
std::string spell(const std::vector<TemplateStep>& program);

}  // namespace infemeral
