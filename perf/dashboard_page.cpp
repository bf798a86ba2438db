#include "perf/dashboard_page.h"

#include <nlohmann/json.hpp>
#include <string_view>

#ifdef INFEMERAL_CHART_JS
// The files as bytes between two symbols. Their paths are the build's (perf/CMakeLists.txt).
#define INFEMERAL_FILE(name, path)                  \
  asm(".section .rodata\n"                          \
      ".global infemeral_" #name                    \
      "_begin\n"                                    \
      ".global infemeral_" #name                    \
      "_end\n"                                      \
      "infemeral_" #name                            \
      "_begin:\n"                                   \
      ".incbin \"" path                             \
      "\"\n"                                        \
      "infemeral_" #name                            \
      "_end:\n"                                     \
      ".byte 0\n"                                   \
      ".text\n");                                   \
  extern "C" const char infemeral_##name##_begin[]; \
  extern "C" const char infemeral_##name##_end[]

INFEMERAL_FILE(page, INFEMERAL_DASHBOARD "/page.html");
INFEMERAL_FILE(style, INFEMERAL_DASHBOARD "/dashboard.css");
INFEMERAL_FILE(script, INFEMERAL_DASHBOARD "/dashboard.js");
INFEMERAL_FILE(chart, INFEMERAL_CHART_JS);
#endif

namespace infemeral {

#ifdef INFEMERAL_CHART_JS
namespace {

// Every marker stands exactly once in the page; what replaces it is not searched again.
void put(std::string& page, std::string_view marker, std::string_view text) {
  page.replace(page.find(marker), marker.size(), text);
}

}  // namespace

absl::StatusOr<std::string> dashboard_page(
    std::span<const std::pair<std::string, nlohmann::json>> reports) {
  nlohmann::json list = nlohmann::json::array();
  for (const auto& [name, report] : reports) list.push_back({{"name", name}, {"data", report}});
  std::string data;
  // No text of a report can end the script element that holds it.
  for (char c : list.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace)) {
    c == '<' ? data += "\\u003c" : data += c;
  }
  std::string page(infemeral_page_begin, infemeral_page_end);
  // From the end of the page to its beginning, so that no text is searched that was put in.
  put(page, "@DASHBOARD_JS@", {infemeral_script_begin, infemeral_script_end});
  put(page, "@CHART_JS@", {infemeral_chart_begin, infemeral_chart_end});
  put(page, "@REPORTS@", data);
  put(page, "@DASHBOARD_CSS@", {infemeral_style_begin, infemeral_style_end});
  return page;
}
#else
absl::StatusOr<std::string> dashboard_page(
    std::span<const std::pair<std::string, nlohmann::json>>) {
  return absl::UnimplementedError(
      "this build has no dashboard, since Chart.js was not found (Debian: libjs-chart.js)");
}
#endif

}  // namespace infemeral
