#include "weight_form.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "dvdquant/kernels.h"
#include "messages.h"

namespace dvdquant::plugin {
namespace {

constexpr size_t kNearby = 3;

struct Names {
  std::mutex mutex;
  std::set<std::string> layers;   // of the nodes that were created
  std::set<std::string> told_of;  // of those that a warning named
};

Names& names() {
  static Names shared;
  return shared;
}

std::set<std::string> split(std::string const& list) {
  std::set<std::string> found;
  for (size_t start = 0; start < list.size();) {
    size_t const comma = std::min(list.find(',', start), list.size());
    if (comma > start) found.insert(list.substr(start, comma - start));
    start = comma + 1;
  }
  return found;
}

// How many characters are inserted, removed or replaced between two names (Levenshtein).
size_t distance(std::string const& left, std::string const& right) {
  std::vector<size_t> row(right.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < left.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < right.size(); ++j) {
      size_t const replaced = diagonal + (left[i] == right[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

std::string nearby(std::string const& name, std::set<std::string> const& layers) {
  std::vector<std::pair<size_t, std::string>> ranked;
  for (std::string const& layer : layers) ranked.emplace_back(distance(name, layer), layer);
  size_t const count = std::min(ranked.size(), kNearby);
  std::partial_sort(ranked.begin(), ranked.begin() + static_cast<std::ptrdiff_t>(count), ranked.end());
  std::string text;
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + ranked[i].second;
  return text;
}

void warn_of_unknown(std::set<std::string> const& wanted) {
  Names& shared = names();
  std::lock_guard<std::mutex> lock(shared.mutex);
  for (std::string const& name : wanted) {
    if (shared.layers.count(name) != 0 || !shared.told_of.insert(name).second) continue;
    log(Severity::kWARNING, "dvdquant QuantLinear: DVDQUANT_WEIGHTS names " + name.substr(0, 200) +
                                ", which no layer of the engines loaded so far is called\n  available: " +
                                std::to_string(shared.layers.size()) + " layers; the nearest: " + nearby(name, shared.layers) +
                                "\n  fix: name the layers as the export does (manifest.json), with commas between");
  }
}

}  // namespace

void remember_layer(std::string const& layer) {
  Names& shared = names();
  std::lock_guard<std::mutex> lock(shared.mutex);
  shared.layers.insert(layer);
}

Form wanted_form(std::string const& layer) {
  char const* const value = std::getenv("DVDQUANT_WEIGHTS");
  std::string const word = value == nullptr ? "" : value;
  if (word.empty() || word == "packed" || word == "auto") return Form::kPacked;
  if (word == "expanded") return Form::kExpanded;
  std::string const mixed = "mixed:";
  if (word.compare(0, mixed.size(), mixed) == 0) {
    std::set<std::string> const wanted = split(word.substr(mixed.size()));
    warn_of_unknown(wanted);
    return wanted.count(layer) == 0 ? Form::kPacked : Form::kExpanded;
  }
  throw Failure(DVDQ_BAD_ARGUMENT, "DVDQUANT_WEIGHTS is " + word.substr(0, 100), "packed, expanded, mixed: with the layers to expand",
                "unset the variable, or name one of these");
}

}  // namespace dvdquant::plugin
