// SPDX-License-Identifier: Apache-2.0
#include "bicubic/bicubic_table.h"

#include <algorithm>
#include <cmath>
#include <list>
#include <mutex>
#include <tuple>
#include <utility>

namespace fastdense {
namespace {

auto key(const BicubicAxis& a) {
  return std::make_tuple(a.in, a.out, a.step, a.a, a.antialias, a.border, a.align_corners, a.transposed,
                         a.short_weights);
}

// Neighbouring entries of one row of a matrix.
struct Row {
  int64_t first = 0;
  std::vector<double> weight;
};

// Centre of output o on the input axis in units of samples; sample j covers [j, j + 1).
double centre(const BicubicAxis& axis, int64_t o) {
  if (axis.align_corners && !axis.antialias) return double(o) * axis.step + 0.5;
  return (double(o) + 0.5) * axis.step;
}

Row make_row(const BicubicAxis& axis, int64_t o) {
  const double at = centre(axis, o);
  const double stretch = axis.antialias && axis.step > 1 ? axis.step : 1.0, squeeze = 1.0 / stretch;
  const double support = kCubicRadius * stretch;
  const auto low = int64_t(std::floor(at - support)), high = int64_t(std::ceil(at + support));
  const int64_t first = axis.border == Border::kSymmetric ? 0 : std::clamp<int64_t>(low, 0, axis.in - 1);
  const int64_t last = axis.border == Border::kSymmetric ? axis.in - 1 : std::clamp<int64_t>(high, 0, axis.in - 1);
  const bool local = low >= 0 && high < axis.in;
  Row row{local ? low : first, {}};
  row.weight.assign(size_t((local ? high : last) - row.first + 1), 0.0);
  double sum = 0;
  for (int64_t j = low; j <= high; ++j) {
    const int64_t index = border_index(j, axis.in, axis.border);
    if (index < 0) continue;
    const double w = cubic_kernel((double(j) - at + 0.5) * squeeze, axis.a);
    row.weight[size_t(index - row.first)] += w;
    sum += w;
  }
  if (axis.border != Border::kClamp || axis.antialias) {
    const double share = 1.0 / sum;
    for (double& w : row.weight) w *= share;
  }
  while (row.weight.size() > 1 && row.weight.back() == 0) row.weight.pop_back();
  size_t zeros = 0;
  while (zeros + 1 < row.weight.size() && row.weight[zeros] == 0) ++zeros;
  row.weight.erase(row.weight.begin(), row.weight.begin() + int64_t(zeros));
  row.first += int64_t(zeros);
  return row;
}

std::vector<Row> transpose(const std::vector<Row>& rows, int64_t columns) {
  std::vector<Row> out(static_cast<size_t>(columns));
  for (size_t r = 0; r < rows.size(); ++r)
    for (size_t i = 0; i < rows[r].weight.size(); ++i) {
      Row& row = out[size_t(rows[r].first) + i];
      if (row.weight.empty()) row.first = int64_t(r);
      row.weight.resize(r - size_t(row.first) + 1, 0.0);
      row.weight.back() = rows[r].weight[i];
    }
  // A sample that no output reads: an empty row, next to its neighbour.
  int64_t previous = 0;
  for (Row& row : out) {
    if (row.weight.empty()) row = {previous, {0.0}};
    previous = row.first;
  }
  return out;
}

// Widens the rows so that starts never fall, then pads them to equal length inside the matrix.
BicubicTable pack(std::vector<Row> rows, int64_t columns) {
  BicubicTable table;
  table.rows = int64_t(rows.size());
  table.columns = columns;
  int64_t least = columns - 1;
  for (size_t r = rows.size(); r-- > 0;) {
    least = std::min(least, rows[r].first);
    rows[r].weight.insert(rows[r].weight.begin(), size_t(rows[r].first - least), 0.0);
    rows[r].first = least;
    table.taps = std::max(table.taps, int64_t(rows[r].weight.size()));
  }
  table.weight.assign(size_t(table.rows * table.taps), 0.0);
  table.identity = table.rows == columns && table.taps == 1;
  for (size_t r = 0; r < rows.size(); ++r) {
    const int64_t start = std::min(rows[r].first, columns - table.taps), shift = rows[r].first - start;
    table.start.push_back(int32_t(start));
    std::copy(rows[r].weight.begin(), rows[r].weight.end(), table.weight.begin() + int64_t(r) * table.taps + shift);
    table.identity = table.identity && start == int64_t(r) && table.weight[r] == 1.0;
  }
  return table;
}

// To the nearest multiples of the smallest power of two for which the largest weight is an integer of 16 bits.
void shorten(BicubicTable& table) {
  constexpr int kMostBits = 22;
  const double largest = *std::max_element(table.weight.begin(), table.weight.end());
  while (table.bits < kMostBits && int(0.5 + std::ldexp(largest, table.bits + 1)) < (1 << 15)) ++table.bits;
  for (double& w : table.weight) w = std::ldexp(std::round(std::ldexp(w, table.bits)), -table.bits);
}

}  // namespace

BicubicTable make_bicubic_table(const BicubicAxis& axis) {
  std::vector<Row> rows;
  rows.reserve(size_t(axis.out));
  for (int64_t o = 0; o < axis.out; ++o) rows.push_back(make_row(axis, o));
  BicubicTable table = axis.transposed ? pack(transpose(rows, axis.in), axis.out) : pack(std::move(rows), axis.in);
  if (axis.short_weights) shorten(table);
  for (int64_t r = 0; r < table.rows; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < table.taps; ++i) sum += std::abs(table.weight[size_t(r * table.taps + i)]);
    table.most = std::max(table.most, sum);
  }
  return table;
}

std::shared_ptr<const BicubicTable> bicubic_table(const BicubicAxis& axis) {
  using Entry = std::pair<BicubicAxis, std::shared_ptr<const BicubicTable>>;
  constexpr size_t kMostEntries = 64;
  static std::mutex mutex;
  static std::list<Entry> cache;  // the most recently used first
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found =
        std::find_if(cache.begin(), cache.end(), [&](const Entry& e) { return key(e.first) == key(axis); });
    if (found != cache.end()) {
      cache.splice(cache.begin(), cache, found);
      return found->second;
    }
  }
  auto made = std::make_shared<const BicubicTable>(make_bicubic_table(axis));
  const std::lock_guard<std::mutex> lock(mutex);
  cache.emplace_front(axis, made);
  if (cache.size() > kMostEntries) cache.pop_back();
  return made;
}

}  // namespace fastdense
