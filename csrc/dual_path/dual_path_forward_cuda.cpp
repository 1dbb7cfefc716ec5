// SPDX-License-Identifier: Apache-2.0
// Forward of the dual path stage on a CUDA device.  The statistics of a norm lie where they are returned; those of
// dense channels are copied from block to block.
#include "dual_path/dual_path_cuda.h"

namespace fastdense {
namespace {

template <typename T>
class Forward : CudaStage<T> {
  using Base = CudaStage<T>;
  using Base::args, Base::cuda, Base::ld, Base::pixels, Base::r;
  using typename Base::A;
  using typename Base::Partials;

 public:
  Forward(const DualPathArgs& args, DualPathKeep keep, const DualPathOutputs& o, const CudaContext& cuda)
      : Base(args, o.out.options(), cuda),
        keep_(keep),
        o_(o),
        rows_(this->rows_of(o.out)),
        out_(this->data(o.out)),
        mean_(this->sums(o.mean)),
        var_(this->sums(o.var)),
        statistics_(args.any_batch_statistics()) {
    if (!keep.bottlenecks) one_a_ = at::empty({std::max(args.in_pixels(), pixels), args.width_a}, this->options);
  }

  void run(const at::Tensor& input) {
    this->pack_weights(0);
    const at::Tensor x = to_channels_last(input), in = this->rows_of(x);
    const int64_t c = args.in_channels, at = args.blocks[0].stats_a;
    if (statistics_) this->statistics(this->matrix(in), args.in_pixels(), c, statistics_from(at));
    at::Tensor residual = in.narrow(1, 0, args.projection ? 0 : r);
    if (args.projection) {
      copy_statistics(at, args.stats_w, c);
      project(this->const_data(x));
      residual = after(0);
    } else {
      rows_.narrow(1, r, args.first_dense).copy_(in.narrow(1, r, args.first_dense));
    }
    for (int64_t i = 0; i < args.num_blocks(); ++i) {
      block(i, i == 0 ? in : residual, residual);
      residual = after(i);
    }
  }

 private:
  // Where block i leaves the residual path.
  at::Tensor after(int64_t i) const {
    return keep_.residuals && i < args.num_blocks() - 1 ? o_.residuals[i] : rows_.narrow(1, 0, r);
  }

  BatchStatistics<A> statistics_from(int64_t first) const { return {mean_ + first, var_ + first}; }

  void copy_statistics(int64_t from, int64_t to, int64_t count) const {
    if (!statistics_) return;
    for (const at::Tensor& t : {o_.mean, o_.var}) t.narrow(0, to, count).copy_(t.narrow(0, from, count));
  }

  // The split: residual_0 and the first dense channels, whose statistics the second block is the first to use.
  void project(const T* x) {
    const int64_t c = args.in_channels, step = this->chunk_rows(pixels, c);
    const NormParams<A> norm = this->norm_params(args.norm_w, mean_ + args.stats_w, var_ + args.stats_w);
    const at::Tensor y = this->workspace(std::min(step, pixels), c), residual = after(0);
    this->for_each_chunk(pixels, step, [&](int64_t row, int64_t count, int64_t) {
      this->reduction(launch_activate_pooled<T>, {{x, c}, this->matrix(y), norm, args.sampled, row}, count, c);
      const at::Tensor left = y.narrow(0, 0, count);
      at::Tensor first = residual.narrow(0, row, count);
      at::Tensor second = rows_.narrow(0, row, count).narrow(1, r, args.first_dense);
      at::mm_out(first, left, this->conv_w().narrow(0, 0, r).t());
      at::mm_out(second, left, this->conv_w().narrow(0, r, args.first_dense).t());
    });
    if (!statistics_ || args.num_blocks() == 1) return;
    const int64_t at = args.blocks[1].stats_a + r;
    this->statistics({out_ + r, ld}, pixels, args.first_dense, statistics_from(at));
  }

  // Block i reads `in` and adds to `residual`.
  void block(int64_t i, const at::Tensor& in, const at::Tensor& residual) {
    const DualPathBlockArgs& block = args.blocks[size_t(i)];
    const NormParams<A> norm_a = this->norm_params(block.norm_a, mean_ + block.stats_a, var_ + block.stats_a);
    const NormParams<A> norm_b = this->norm_params(block.norm_b, mean_ + block.stats_b, var_ + block.stats_b);
    const int64_t rows = args.a_pixels(i);
    const at::Tensor a = keep_.bottlenecks ? o_.a.narrow(0, args.a_row(i), rows) : one_a_.narrow(0, 0, rows);
    this->make_a(i, this->sources(i, this->matrix(in), out_), norm_a, a);
    if (!block.norm_b.frozen()) this->statistics(this->matrix(a), rows, args.width_a, statistics_from(block.stats_b));
    const at::Tensor b =
        this->make_b(i, a, norm_b, keep_.bottlenecks ? o_.b.narrow(0, i * pixels, pixels) : at::Tensor(),
                     block.norm_c.frozen() ? BatchStatistics<A>{} : statistics_from(block.stats_c));
    merge(i, b, residual);
  }

  // Chunk by chunk conv_c, whose first columns are added to the residual path and whose last are dense channels, and
  // the moments of both for the next block.
  void merge(int64_t i, const at::Tensor& b, const at::Tensor& residual) {
    const DualPathBlockArgs& block = args.blocks[size_t(i)];
    const NormParams<A> norm = this->norm_params(block.norm_c, mean_ + block.stats_c, var_ + block.stats_c);
    const int64_t k = args.growth, first = r + args.dense(i), step = this->chunk_rows(pixels, args.width_b + r + k);
    const bool wanted = statistics_ && i < args.num_blocks() - 1;
    const at::Tensor y = this->workspace(std::min(step, pixels), args.width_b);
    const at::Tensor z = this->workspace(std::min(step, pixels), r + k);
    const at::Tensor pivot = at::empty({r + k}, this->options);
    const Partials added = this->partials(pixels, step, r), appended = this->partials(pixels, step, k);
    const Matrix<T> source = this->matrix(b), from = this->matrix(z), add = this->matrix(residual);
    const Matrix<T> to = this->matrix(after(i)), dense{out_ + first, ld};
    this->for_each_chunk(pixels, step, [&](int64_t row, int64_t count, int64_t chunk) {
      this->reduction(launch_activate<T>, {source.from_row(row), this->matrix(y), norm, true}, count, args.width_b);
      at::Tensor product = z.narrow(0, 0, count);
      at::mm_out(product, y.narrow(0, 0, count), this->conv_c(i).t());
      if (chunk == 0 && count > 0 && wanted) {
        // The first row of the result, in a place of its own: in place, others read rows that are not yet added to.
        pivot.copy_(z[0]);
        pivot.narrow(0, 0, r).add_(residual[0]);
      }
      A* const of_added = wanted ? added.of_chunk(chunk) : nullptr;
      A* const of_appended = wanted ? appended.of_chunk(chunk) : nullptr;
      store({from, to.from_row(row), {}, of_added, add.from_row(row), this->const_data(pivot)}, count, r, added.splits);
      store({from.from_column(r), dense.from_row(row), {}, of_appended, {}, this->const_data(pivot) + r}, count, k,
            appended.splits);
    });
    if (!wanted) return;
    const int64_t next = args.blocks[size_t(i) + 1].stats_a;
    this->finalise_moments(added, this->const_data(pivot), pixels, statistics_from(next));
    if (i > 0 || !args.projection) copy_statistics(block.stats_a + r, next + r, args.dense(i));
    this->finalise_moments(appended, this->const_data(pivot) + r, pixels, statistics_from(next + first));
  }

  void store(const SliceInParams<T>& params, int64_t rows, int64_t columns, int64_t splits) const {
    check_launch(launch_slice_in<T>(params, rows, columns, splits, cuda.stream));
  }

  const DualPathKeep keep_;
  const DualPathOutputs& o_;
  const at::Tensor rows_;  // the output as [pixels, C]
  T* const out_;
  A *const mean_, *const var_;
  const bool statistics_;
  at::Tensor one_a_;  // of one block at a time: [rows, ra]
};

}  // namespace

template <typename T>
void dual_path_forward_cuda(const DualPathArgs& args, DualPathKeep keep, const at::Tensor& input,
                            const DualPathOutputs& o, const CudaContext& cuda) {
  Forward<T>(args, keep, o, cuda).run(input);
}

#define FASTDENSE_FORWARD(T)                                                                    \
  template void dual_path_forward_cuda<T>(const DualPathArgs&, DualPathKeep, const at::Tensor&, \
                                          const DualPathOutputs&, const CudaContext&);
FASTDENSE_FORWARD(float)
FASTDENSE_FORWARD(double)
FASTDENSE_FORWARD(bfloat16)
FASTDENSE_FORWARD(half)
#undef FASTDENSE_FORWARD

}  // namespace fastdense
