// Tiles of an operand in shared memory, and the fragments that the tensor cores take from them.
//
// A tile is `extent` rows or columns of the operand (M of A, N of B) times 64 bytes of K. It lies
// as the operand does: along K (each row's 64 bytes together) or across (each k's `extent` elements
// together), so that it is copied in pieces of 16 bytes either way. Pieces are exchanged within a
// row
// ("swizzled") so that the eight threads of a memory access meet eight different banks of 16 bytes.
#pragma once
#include "cuda/ptx.cuh"

namespace fastnn::cuda {

constexpr int kRowBytes = 64;  // of K in a tile
constexpr int kPieceBytes = 16;

// What a tile is copied from. Offsets in elements.
struct Source {
  const char* data;
  int64_t extent, k;                // how much there is
  int64_t extent_stride, k_stride;  // in elements
  bool pieces;                      // whether 16 bytes may be copied at once
};

// 16 bytes of elements that lie `step` apart, of which `count` exist; the others are 0.
template <class Element>
__device__ __forceinline__ void copy_elements(char* to, const char* from, int64_t step, int count) {
  constexpr int kSize = sizeof(Element), kEach = kPieceBytes / kSize;
  Element elements[kEach];
#pragma unroll
  for (int e = 0; e < kEach; e++)
    elements[e] =
        e < count ? *reinterpret_cast<const Element*>(from + e * step * kSize) : Element{};
  uint4 together;
  memcpy(&together, elements, kPieceBytes);
  *reinterpret_cast<uint4*>(to) = together;
}

template <class Element, int extent, bool along_k, int threads>
struct TileOf {
  using Type = Element;
  static constexpr int kSize = sizeof(Element), kDepth = kRowBytes / kSize;
  static constexpr int kBytes = extent * kRowBytes, kPieces = kBytes / kPieceBytes;
  static constexpr int kEach = kPieceBytes / kSize;  // elements of a piece
  static constexpr int kRow =
      along_k ? kRowBytes / kPieceBytes : extent / kEach;  // pieces of a row
  static_assert(kPieces % threads == 0);

  // Where a piece lies, in bytes from the tile's beginning. `row` counts M or N where the tile lies
  // along K, and k where it lies across.
  __device__ static __forceinline__ int offset(int row, int piece) {
    // Two rows along K share a set of 128 bytes; float32 lying across is read by columns of four k.
    const int with = along_k ? (row >> 1) & 3 : kSize == 4 ? ((row >> 2) & 3) << 1 : row & 7;
    return (row * kRow + (piece ^ with)) * kPieceBytes;
  }

  // An element, for what has no fragments.
  __device__ static __forceinline__ float element(const char* tile, int at, int k) {
    const int row = along_k ? at : k, column = along_k ? k : at;
    return to_float(*reinterpret_cast<const Element*>(tile + offset(row, column / kEach) +
                                                      column % kEach * kSize));
  }
  // The pieces that this thread copies.
  static constexpr int kEachThreads = kPieces / threads;
  __device__ static __forceinline__ const char* own_piece(const char* tile, int i) {
    const int index = i * threads + int(threadIdx.x);
    return tile + offset(index / kRow, index % kRow);
  }

  // Begins to copy the tile at (first, k0), with zeros where the operand ends.
  __device__ static __forceinline__ void load(char* tile, const Source& from, int64_t first,
                                              int64_t k0) {
#pragma unroll
    for (int i = 0; i < kPieces / threads; i++) {
      const Piece p(tile, from, i * threads + int(threadIdx.x), first, k0);
      if (from.pieces)
        p.copy(from);
      else
        p.copy_elements(from);
    }
  }
  // Likewise where from.pieces is known.
  __device__ static __forceinline__ void load_pieces(char* tile, const Source& from, int64_t first,
                                                     int64_t k0) {
#pragma unroll
    for (int i = 0; i < kPieces / threads; i++)
      Piece(tile, from, i * threads + int(threadIdx.x), first, k0).copy(from);
  }
  __device__ static __forceinline__ void load_elements(char* tile, const Source& from,
                                                       int64_t first, int64_t k0) {
#pragma unroll 1
    for (int i = 0; i < kPieces / threads; i++)
      Piece(tile, from, i * threads + int(threadIdx.x), first, k0).copy_elements(from);
  }

  struct Piece {
    char* to;
    const char* source;
    int count;  // of its elements that exist

    __device__ __forceinline__ Piece(char* tile, const Source& from, int index, int64_t first,
                                     int64_t k0) {
      const int row = index / kRow, piece = index % kRow;
      const int64_t at = first + (along_k ? row : piece * kEach);
      const int64_t k = k0 + (along_k ? piece * kEach : row);
      to = tile + offset(row, piece);
      const int64_t left =
          along_k ? (at < from.extent ? from.k - k : 0) : (k < from.k ? from.extent - at : 0);
      count = left >= kEach ? kEach : left > 0 ? int(left) : 0;
      source = from.data + (at * from.extent_stride + k * from.k_stride) * kSize;
    }
    __device__ __forceinline__ void copy(const Source& from) const {
      ptx::cp_async<kPieceBytes>(to, count ? source : from.data, count * kSize);
    }
    __device__ __forceinline__ void copy_elements(const Source& from) const {
      cuda::copy_elements<Element>(to, source, along_k ? from.k_stride : from.extent_stride, count);
    }
  };

  // ---- fragments of 8- and 16-bit elements: 32 bytes of K in step `step` -----------------------

  // A's 16 rows from `first`.
  __device__ static __forceinline__ void a_fragment(uint32_t (&r)[4], const char* tile, int first,
                                                    int step) {
    const int lane = int(threadIdx.x) % 32;
    if constexpr (along_k)
      ptx::ldmatrix_x4(r, tile + offset(first + lane % 16, 2 * step + lane / 16));
    else
      ptx::ldmatrix_x4_trans(
          r, tile + offset(16 * step + lane % 8 + lane / 16 * 8, first / 8 + lane / 8 % 2));
  }
  // B's 16 columns from `first`: r[0], r[1] of the first eight.
  __device__ static __forceinline__ void b_fragments(uint32_t (&r)[4], const char* tile, int first,
                                                     int step) {
    const int lane = int(threadIdx.x) % 32;
    if constexpr (along_k)
      ptx::ldmatrix_x4(r, tile + offset(first + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    else
      ptx::ldmatrix_x4_trans(r, tile + offset(16 * step + lane % 16, first / 8 + lane / 16));
  }

  // B of which K runs along the rows of a tile that lies along the other dimension: rows `first` to
  // `first` + 15, and the 16 columns from `piece` on. r[0], r[1] of the first eight.
  __device__ static __forceinline__ void b_of_rows(uint32_t (&r)[4], const char* tile, int first,
                                                   int piece) {
    static_assert(along_k);
    const int lane = int(threadIdx.x) % 32;
    ptx::ldmatrix_x4_trans(r, tile + offset(first + lane % 16, piece + lane / 16));
  }

  // ---- float32: four neighbours along K of one row or column -----------------------------------

  // Thread t of a group of four gets k = 4 t to 4 t + 3. The tensor cores take 2 t, 2 t + 1, 2 t +
  // 8 and 2 t + 9 from it; which k it is does not matter to a sum as long as A and B agree.
  __device__ static __forceinline__ void four(float (&x)[4], const char* tile, int at) {
    const int t = int(threadIdx.x) % 4;
    if constexpr (along_k) {
      const float4 v = *reinterpret_cast<const float4*>(tile + offset(at, t));
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[i] = *reinterpret_cast<const float*>(tile + offset(4 * t + i, at / 4) + at % 4 * 4);
    }
  }

  // Likewise of float32: column `column` of the rows that the tensor cores take from thread t,
  // counted from `first`.
  __device__ static __forceinline__ void four_of_rows(float (&x)[4], const char* tile, int first,
                                                      int column) {
    static_assert(along_k);
    const int t = int(threadIdx.x) % 4;
#pragma unroll
    for (int i = 0; i < 4; i++)
      x[i] = *reinterpret_cast<const float*>(
          tile + offset(first + 2 * t + i % 2 + i / 2 * 8, column / 4) + column % 4 * 4);
  }
};

}  // namespace fastnn::cuda
