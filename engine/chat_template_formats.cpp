#include "engine/chat_template_formats.h"

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/chat_template_program.h"
#include "engine/text.h"
#include "engine/tokenizer_json.h"

namespace infemeral {
namespace {

using Kind = TemplateStep::Kind;
using Program = std::vector<TemplateStep>;
using Strings = std::span<const std::string_view>;

absl::Status unknown(std::string_view why) {
  return absl::UnimplementedError(
      cat("the chat template is not one of ChatML, Qwen3, Llama 3, Mistral or Llama 2 (", why,
          "); format the prompt yourself and send it as plain text"));
}

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

bool is_one_of(std::string_view text, Strings list) {
  return std::find(list.begin(), list.end(), text) != list.end();
}

// Whether the program writes or keeps a text with this in it.
bool writes(const Program& program, std::string_view part) {
  return std::any_of(program.begin(), program.end(), [&](const TemplateStep& step) {
    if (step.kind == Kind::kText) return contains(step.text, part);
    return step.kind == Kind::kSet &&
           std::any_of(step.literals.begin(), step.literals.end(),
                       [&](const std::string& literal) { return contains(literal, part); });
  });
}

bool has(const Program& program, Kind kind, std::string_view part) {
  return std::any_of(program.begin(), program.end(), [&](const TemplateStep& step) {
    return step.kind == kind && contains(step.text, part);
  });
}

// ---- step by step ----

// Every step of a program of the family is one of these. They are few, each means the same wherever
// it may stand, and the order is the only one in which they make sense; what is not among them
// would be another prompt.
struct Steps {
  Strings texts;
  Strings outputs;
  Strings sets;
};

constexpr std::array kLoops = std::to_array<std::string_view>(
    {"messages", "loop_messages", "messages[::-1]", "messages|reverse"});

// What conditions may compare with: a template that looks for other words does something about
// them.
constexpr std::array kComparedWith =
    std::to_array<std::string_view>({"system", "user", "assistant", "tool", "ipython", "tool_calls",
                                     "<tool_response>", "</tool_response>", "<think>", "</think>"});

// The steps that nothing follows from.
constexpr std::array kIdleSets = std::to_array<std::string_view>(
    {"loop_messages=messages", "tools=none", "tools_in_user_message=true",
     "tools_in_user_message=false", "add_generation_prompt=false"});

// a.role and a.content of a loop's message or, where that is the system message, of the first.
bool is_field(const TemplateStep& step, std::string_view field) {
  std::string_view text = step.text;
  if (!text.ends_with(field)) return false;
  text.remove_suffix(field.size());
  if (text == "messages[0]") return step.guard == "messages[0].role==\"system\"";
  return step.in_loop && text.find_first_of(".[](|") == std::string_view::npos;
}

std::optional<std::string> first_other_step(const Program& program, const Steps& known) {
  for (const TemplateStep& step : program) {
    if (step.text.empty()) continue;  // found right where it stands
    switch (step.kind) {
      case Kind::kText:
        if (!is_one_of(step.text, known.texts)) {
          return cat("it writes ", tok::shown(step.text));
        }
        break;
      case Kind::kOutput:
        if (!is_one_of(step.text, known.outputs) && !step.text.starts_with("raise_exception(")) {
          return cat("it writes the value of ", tok::shown(step.text));
        }
        break;
      case Kind::kSet:
        if (!is_one_of(step.text, known.sets) && !is_one_of(step.text, kIdleSets)) {
          return cat("it sets ", tok::shown(step.text));
        }
        break;
      case Kind::kFor:
        if (const std::size_t in = step.text.find(" in ");
            in == std::string::npos || !is_one_of(step.text.substr(in + 4), kLoops)) {
          return cat("it loops over ", tok::shown(step.text));
        }
        break;
      case Kind::kIf:
      case Kind::kElif:
        for (const std::string& literal : step.literals) {
          if (!is_one_of(literal, kComparedWith)) {
            return cat("it looks for ", tok::shown(literal));
          }
        }
        break;
      case Kind::kMark:
        break;
    }
  }
  return std::nullopt;
}

// A loop that picks messages by their roles must pick the system's too.
bool forgets_system(const Program& program) {
  bool user = false, system = false;
  for (const TemplateStep& step : program) {
    const bool condition = step.kind == Kind::kIf || step.kind == Kind::kElif;
    for (const std::string& literal : step.literals) {
      user |= condition && literal == "user";
      system |= condition && literal == "system";
    }
  }
  return user && !system;
}

constexpr std::string_view kAsksForAnswer[] = {
    "add_generation_prompt", "add_generation_prompt==true", "loop.last and add_generation_prompt"};

// ---- ChatML and Qwen3 ----

constexpr std::string_view kSystem = "<|im_start|>system\n";
constexpr std::string_view kAnswer = "<|im_start|>assistant\n";
constexpr std::string_view kEnd = "<|im_end|>\n";

// Whether a step is taken where the first message is no system message, once.
bool is_without_system(const TemplateStep& step) {
  constexpr std::string_view kBefore[] = {"messages[0].role!=\"system\"",
                                          "not messages[0].role==\"system\""};
  constexpr std::string_view kLooping[] = {"loop.first and messages[0].role!=\"system\"",
                                           "loop.first and message.role!=\"system\"",
                                           "loop.index0==0 and messages[0].role!=\"system\""};
  return step.in_loop ? is_one_of(step.guard, kLooping) : is_one_of(step.guard, kBefore);
}

constexpr std::string_view kReasoning =
    "reasoning_content=content.split(\"</think>\")[0].rstrip(\"\\n\")"
    ".split(\"<think>\")[-1].lstrip(\"\\n\")";
constexpr std::string_view kReasoningOfMessage =
    "reasoning_content=message.content.split(\"</think>\")[0].rstrip(\"\\n\")"
    ".split(\"<think>\")[-1].lstrip(\"\\n\")";

absl::StatusOr<ChatFormat> recognise_chatml(Program program) {
  ChatFormat format;
  bool asks = false, system_apart = false;
  std::vector<std::string_view> texts = {"<|im_start|>", "\n", kEnd};
  std::vector<std::string_view> outputs = {"content"};
  std::vector<std::string_view> sets = {"content=message.content"};
  for (TemplateStep& step : program) {
    system_apart |= step.kind == Kind::kOutput && step.text == "messages[0].content";
    if (step.kind == Kind::kOutput && (is_field(step, ".role") || is_field(step, ".content"))) {
      step.text.clear();
    }
    if (step.kind != Kind::kText) continue;
    // Markup with a role in it: where the message has that role,
    // or where an answer is asked for.
    const std::string& guard = step.guard;
    if (step.text == kAnswer && is_one_of(guard, kAsksForAnswer)) {
      asks = true;
      step.text.clear();
    } else if ((step.text == kSystem && guard.ends_with(".role==\"system\"") &&
                !guard.starts_with("not ")) ||
               (step.text == "<|im_start|>user\n" && guard == "message.role==\"user\"") ||
               (step.text == kAnswer && guard == "message.role==\"assistant\"")) {
      step.text.clear();
    } else if (step.text.starts_with(kSystem) && step.text.ends_with(kEnd) &&
               step.text.size() > kSystem.size() + kEnd.size() && is_without_system(step) &&
               format.default_system.empty()) {
      format.default_system =
          step.text.substr(kSystem.size(), step.text.size() - kSystem.size() - kEnd.size());
      if (contains(format.default_system, "<|im_")) return unknown("it begins with a chat");
      step.text.clear();
    }
  }
  if (writes(program, "think>") || has(program, Kind::kOutput, "reasoning_content")) {
    constexpr std::string_view kTexts[] = {"\n<think>\n", "\n</think>\n\n"};
    constexpr std::string_view kOutputs[] = {"content.lstrip(\"\\n\")",
                                             "reasoning_content.strip(\"\\n\")"};
    constexpr std::string_view kSets[] = {
        "ns=namespace(multi_step_tool=true,last_query_index=messages|length-1)",
        "index=(messages|length-1)-loop.index0",
        "ns.multi_step_tool=false",
        "ns.last_query_index=index",
        "reasoning_content=\"\"",
        "content=message.content.split(\"</think>\")[-1].lstrip(\"\\n\")",
        "content=content.split(\"</think>\")[-1].lstrip(\"\\n\")",
        kReasoning,
        kReasoningOfMessage};
    texts.insert(texts.end(), std::begin(kTexts), std::end(kTexts));
    outputs.insert(outputs.end(), std::begin(kOutputs), std::end(kOutputs));
    sets.insert(sets.end(), std::begin(kSets), std::end(kSets));
    if (!has(program, Kind::kIf, "loop.index0>ns.last_query_index") ||
        !has(program, Kind::kIf, "loop.last or(not loop.last and reasoning_content)") ||
        !has(program, Kind::kIf, ".startswith(\"<tool_response>\")")) {
      return unknown("it resembles ChatML with reasoning of its own kind");
    }
    format.family = ChatFormat::Family::kQwen3;
  }
  if (const auto other = first_other_step(program, {texts, outputs, sets})) {
    return unknown(cat("it resembles ChatML, but ", *other));
  }
  // A system message that is written before the loop is not written in it again; later ones are.
  const bool once = !system_apart || has(program, Kind::kIf, "not loop.first");
  if (!asks || !once || forgets_system(program)) return unknown("it only resembles ChatML");
  return format;
}

// ---- Llama 3 ----

constexpr std::string_view kAssistantHeader = "<|start_header_id|>assistant<|end_header_id|>\n\n";

absl::StatusOr<ChatFormat> recognise_llama3(Program program) {
  ChatFormat format{.family = ChatFormat::Family::kLlama3};
  const std::string dates =
      "<|start_header_id|>system<|end_header_id|>\n\n"
      "Cutting Knowledge Date: December 2023\nToday Date: ";
  std::vector<std::string_view> texts = {"<|start_header_id|>", "<|end_header_id|>\n\n",
                                         "<|eot_id|>"};
  std::vector<std::string_view> outputs = {"bos_token", "message.role", "message.content|trim",
                                           "content"};
  std::vector<std::string_view> sets = {
      "content=\"<|start_header_id|>\"+message.role+\"<|end_header_id|>\\n\\n\"+"
      "message.content|trim+\"<|eot_id|>\"",
      "content=bos_token+content"};
  bool begins = false, trims = false, asks = false;
  for (TemplateStep& step : program) {
    begins |= contains(step.text, "bos_token");
    trims |= contains(step.text, "message.content|trim");
    if (step.kind != Kind::kText) continue;
    if (step.text == dates && step.guard.empty() && !step.in_loop) {
      format.dates = true;
    } else if (step.text == kAssistantHeader &&
               (is_one_of(step.guard, kAsksForAnswer) || (step.guard.empty() && !step.in_loop))) {
      asks = true;
      format.always_generate = step.guard.empty();
      step.text.clear();
    }
  }
  if (format.dates) {
    texts.insert(texts.end(), {dates, "\n\n"});
    outputs.insert(outputs.end(), {"date_string", "system_message"});
    sets.insert(sets.end(), {"date_string=\"26 Jul 2024\"", "system_message=\"\"",
                             "system_message=messages[0].content|trim", "messages=messages[1:]"});
  }
  if (const auto other = first_other_step(program, {texts, outputs, sets})) {
    return unknown(cat("it resembles Llama 3, but ", *other));
  }
  const bool once = !format.dates || (has(program, Kind::kOutput, "date_string") &&
                                      has(program, Kind::kOutput, "system_message") &&
                                      has(program, Kind::kSet, "messages=messages[1:]"));
  if (!begins || !trims || !asks || !once || forgets_system(program)) {
    return unknown("it only resembles Llama 3");
  }
  return format;
}

// ---- Mistral and Llama 2 ----

// Here every space counts, and the published programs are few: they are compared as a whole.
struct KnownProgram {
  std::string program;
  InstructStyle style;
};

const std::vector<KnownProgram>& known_instruct_programs() {
  using System = InstructStyle::System;
  static const std::vector<KnownProgram> known = [] {
    // Parts that several have in common.
    const std::string raise = "{{raise_exception()}}";
    const std::string turns =
        cat("{%if (message.role==\"user\")!=(loop.index0%2==0)%}", raise, "{%endif%}");
    const std::string question = "{%if message.role==\"user\"%}";
    const std::string answer = "{%elif message.role==\"assistant\"%}";
    const std::string end = cat("{%else%}", raise, "{%endif%}{%endfor%}");
    const std::string system =
        "{%if messages[0].role==\"system\"%}{%set system_message=messages[0].content%}"
        "{%set loop_messages=messages[1:]%}{%else%}{%set loop_messages=messages%}{%endif%}";
    const auto instruction = [](std::string_view open, std::string_view close) {
      return cat("{{\"", open, "\"}}{{message.content}}{{\"", close, "\"}}");
    };
    const auto with_system = [&](std::string_view when, std::string_view open,
                                 std::string_view close) {
      return cat("{%if ", when, " and system_message is defined%}{{\"", open,
                 "\"}}{{system_message}}{{\"\\n\\n\"}}{{message.content}}{{\"", close,
                 "\"}}{%else%}", instruction(open, close), "{%endif%}");
    };
    // From v0.3 on, with the parts for tools that a plain chat passes through.
    const auto with_tools = [&](std::string_view open, std::string_view its_answer) {
      return cat(system, "{%if not tools is defined%}{%set tools=none%}{%endif%}",
                 "{%set user_messages=loop_messages|selectattr(\"role\",\"equalto\",\"user\")|"
                 "list%}{%set ns=namespace()%}{%set ns.index=0%}{%for message in loop_messages%}"
                 "{%if (message.role==\"user\")!=(ns.index%2==0)%}",
                 raise, "{%endif%}{%set ns.index=ns.index+1%}{%endfor%}",
                 "{{bos_token}}{%for message in loop_messages%}", question,
                 with_system("loop.last", open, "[/INST]"), answer, its_answer, end);
    };
    const std::string plain =
        cat("{{bos_token}}{%for message in messages%}", turns, question,
            instruction("[INST] ", " [/INST]"), answer, "{{message.content}}{{eos_token}}");
    return std::vector<KnownProgram>{
        // Mistral-7B-Instruct-v0.1 and, without the last space, -v0.2 when they came out.
        {cat(plain, "{{\" \"}}", end), {.after_end = " "}},
        {cat(plain, end), {}},
        // Both since 2024.
        {cat(system, "{{bos_token}}{%for message in loop_messages%}", turns, question,
             with_system("loop.first", " [INST] ", " [/INST]"), answer,
             "{{\" \"}}{{message.content}}{{eos_token}}", end),
         {.before_question = " [INST] ", .before_answer = " ", .system = System::kFirst}},
        // Mistral-7B-Instruct-v0.3.
        {with_tools("[INST] ", "{{\" \"}}{{message.content|trim}}{{eos_token}}"),
         {.after_question = "[/INST]",
          .before_answer = " ",
          .system = System::kLast,
          .strip_answers = true}},
        // Mistral-Nemo-Instruct-2407.
        {with_tools("[INST]", "{{message.content}}{{eos_token}}"),
         {.before_question = "[INST]", .after_question = "[/INST]", .system = System::kLast}},
        // Llama-2-chat.
        {cat("{%if messages[0].role==\"system\"%}{%set loop_messages=messages[1:]%}"
             "{%set system_message=messages[0].content%}{%else%}{%set loop_messages=messages%}"
             "{%set system_message=false%}{%endif%}{%for message in loop_messages%}",
             turns,
             "{%if loop.index0==0 and system_message!=false%}"
             "{%set content=\"<<SYS>>\\n\"+system_message+\"\\n<</SYS>>\\n\\n\"+message.content%}"
             "{%else%}{%set content=message.content%}{%endif%}",
             question, "{{bos_token}}{{\"[INST] \"}}{{content.strip()}}{{\" [/INST]\"}}", answer,
             "{{\" \"}}{{content.strip()}}{{\" \"}}{{eos_token}}{%endif%}{%endfor%}"),
         {.before_answer = " ",
          .before_end = " ",
          .system = System::kTags,
          .strip_questions = true,
          .strip_answers = true,
          .begin_each = true}}};
  }();
  return known;
}

absl::StatusOr<ChatFormat> recognise_instruct(const Program& program) {
  const std::string spelled = spell(program);
  for (const KnownProgram& known : known_instruct_programs()) {
    if (spelled == known.program) {
      return ChatFormat{.family = ChatFormat::Family::kInstruct, .instruct = &known.style};
    }
  }
  return unknown("it resembles Mistral and Llama 2, but is none of their published templates");
}

}  // namespace

absl::StatusOr<ChatFormat> recognise_chat_format(std::string_view jinja) {
  absl::StatusOr<Program> program = read_template_program(jinja);
  if (!program.ok()) return unknown(std::string(program.status().message()));
  if (writes(*program, "<|start_header_id|>") && writes(*program, "<|eot_id|>")) {
    return recognise_llama3(*std::move(program));
  }
  if (writes(*program, "<|im_start|>") && writes(*program, "<|im_end|>")) {
    return recognise_chatml(*std::move(program));
  }
  if (writes(*program, "[INST]")) return recognise_instruct(*program);
  return unknown("it has the marks of none");
}

}  // namespace infemeral
