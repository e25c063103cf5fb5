// Which lines and lanes stay, on the CPU: indices that are proven, and the blocks that they make of a
// line.
#pragma once

#include "fold_pack_vec.h"

#include <algorithm>
#include <vector>

namespace gatepack {

// Without a way out, so that the compiler can take several at once.
inline bool is_increasing(const int64_t* index, int64_t n) {
  bool increasing = true;
  for (int64_t i = 1; i < n; ++i) increasing &= index[i - 1] < index[i];
  return increasing;
}

// An index as int64, after proof that it is strictly increasing and inside [0, bound).
//
// in_place: int64 is read where it lies, without a copy, which a small matrix would feel; for fresh
// results only, because one that the caller brings may share the memory of an index.
class Units {
 public:
  Units(const Where& where, const char* name, Index index, int64_t n, int64_t bound, bool in_place)
      : size_(n) {
    if (!index.data) return;
    const auto* wide = static_cast<const int64_t*>(index.data);
    const auto* narrow = static_cast<const int32_t*>(index.data);
    copy_.reserve(index.wide && in_place ? 0 : n + 1);  // an empty copy has an address too
    if (!index.wide) copy_.assign(narrow, narrow + n);
    else if (!in_place) copy_.assign(wide, wide + n);
    data_ = index.wide && in_place ? wide : copy_.data();
    if (!is_increasing(data_, n)) {
      const int64_t i =
          std::adjacent_find(data_, data_ + n, [](auto a, auto b) { return a >= b; }) - data_;
      require(false, where(name), " must be strictly increasing, got ", data_[i + 1], " at ", i + 1,
              " after ", data_[i]);
    }
    if (n > 0) {
      const int64_t worst = data_[0] < 0 ? data_[0] : data_[n - 1];
      require(worst >= 0 && worst < bound, where(name), " must be in [0, ", bound, "), got ",
              worst);
    }
  }
  Units(const Units&) = delete;

  const int64_t* data() const { return data_; }  // null: all
  int64_t size() const { return size_; }
  int64_t operator[](int64_t i) const { return data_ ? data_[i] : i; }

 private:
  std::vector<int64_t> copy_;
  const int64_t* data_ = nullptr;
  int64_t size_;
};

// The blocks of a line and their shuffle patterns.
class Cover {
 public:
  Cover(const Units& kept, int64_t lanes, Geometry geometry, bool adjoint)
      : geometry_(geometry) {
    switch (geometry.unit) {
      case 2: fill<uint16_t>(kept, lanes, adjoint); break;
      case 4: fill<uint32_t>(kept, lanes, adjoint); break;
      case 8: fill<uint64_t>(kept, lanes, adjoint); break;
      default: fill<uint8_t>(kept, lanes, adjoint);
    }
  }

  const std::vector<Block>& blocks() const { return blocks_; }
  const uint8_t* patterns() const { return reinterpret_cast<const uint8_t*>(patterns_.data()); }

 private:
  // Entry: an unsigned type of the size of a pattern's entries.
  template <class Entry>
  void fill(const Units& kept, int64_t lanes, bool adjoint) {
    const Geometry& geometry = geometry_;
    const int64_t n = kept.size();
    const int64_t most = adjoint ? lanes / geometry.width + 1 : n / geometry.width + 1;
    blocks_.reserve(most);
    if (geometry.unit) patterns_.reserve(most);
    if (adjoint) {
      for (int64_t j = 0, start = 0; start < lanes; start += geometry.width) {
        CacheLine& pattern = add(start);
        for (; j < n && kept[j] < start + geometry.width; ++j) {
          set<Entry>(pattern, kept[j] - start, blocks_.back().count++);
        }
      }
    } else {
      // Greedy: a block starts at the first lane not yet covered, so closed stretches are skipped;
      // the last ones move back to stay inside the line.
      for (int64_t j = 0; j < n;) {
        const int64_t start = std::min(kept[j], lanes - geometry.span);
        CacheLine& pattern = add(start);
        for (int k = 0; k < geometry.width && j < n && kept[j] < start + geometry.span; ++k, ++j) {
          set<Entry>(pattern, blocks_.back().count++, kept[j] - start);
        }
      }
    }
  }

  CacheLine& add(int64_t start) {
    blocks_.push_back({static_cast<int32_t>(start), 0});
    if (geometry_.unit) patterns_.emplace_back();
    CacheLine& pattern = geometry_.unit ? patterns_.back() : unused_;
    std::memset(pattern.bytes, 0xff, kPatternBytes);
    return pattern;
  }

  // Little-endian entries, as on every machine that has a pattern-driven Mover.
  template <class Entry>
  void set(CacheLine& pattern, int64_t lane, int64_t source) {
    for (int e = 0; e < geometry_.per_lane; ++e) {
      const Entry entry = static_cast<Entry>(source * geometry_.per_lane + e);
      std::memcpy(pattern.bytes + (lane * geometry_.per_lane + e) * sizeof entry, &entry,
                  sizeof entry);
    }
  }

  Geometry geometry_;
  std::vector<Block> blocks_;
  std::vector<CacheLine> patterns_;
  CacheLine unused_;
};

}  // namespace gatepack
