// Where engine_run's results go: JSON lines to a file or stdout, text to stdout, or both.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace infemeral {

struct ResultWriterOptions {
  std::string file;          // result lines; "-" is stdout; empty: text on stdout instead
  bool overwrite = false;    // an existing file is an error otherwise
  bool append = false;       // likewise; keep() says what stays of it
  bool stream_text = false;  // text on stdout beside a file
};

class ResultWriter {
 public:
  // AlreadyExists rather than losing an older run's results; InvalidArgument when text and lines
  // would both go to stdout, or when there is no regular file to append to; FailedPrecondition when
  // another run writes the file; the system's reason when it cannot be written. Old results are
  // replaced at the first new one, and a run that ends before it leaves no new file.
  static absl::StatusOr<std::unique_ptr<ResultWriter>> open(const ResultWriterOptions& options);
  ~ResultWriter();
  ResultWriter(const ResultWriter&) = delete;
  ResultWriter& operator=(const ResultWriter&) = delete;

  // With `append`: the file's first bytes stay, what is behind them goes at the first new result.
  // `end_line` when they end in the middle of a line.
  void keep(std::uint64_t bytes, bool end_line);

  bool text_on_terminal() const;

  // A piece of generated text, shown at once.
  void text(std::string_view piece);
  // The end of an item: its line is written and flushed, so that a killed run keeps it.
  absl::Status result(std::string_view line, bool ok);
  absl::Status finish();

 private:
  ResultWriter() = default;
  absl::Status check(std::FILE* file, std::string_view name) const;
  absl::Status start_lines();

  std::string name_;
  std::FILE* lines_ = nullptr;  // null: text only
  bool owns_lines_ = false;
  bool created_ = false;  // by this run
  std::uint64_t kept_ = 0;
  bool end_line_ = false;
  bool started_ = false;  // a result was written
  bool show_text_ = false;
};

}  // namespace infemeral
