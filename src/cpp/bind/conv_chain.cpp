// Convolutions, inverted residuals and poolings one after the other, as one call: what a fused
// network is between its other layers. From Python each of them would be a call of its own with a
// tensor of torch's for its result: 10 us, of the 50 to 100 that a small layer computes.
#include <algorithm>
#include <memory>
#include <vector>

#include "bind/conv_layers.hpp"
#include "bind/pool_windows.hpp"
#include "common/integers.hpp"
#include "common/memory.hpp"
#include "gemm/prepared.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

class Chain {
 public:
  // Null where a step is not understood.
  static std::unique_ptr<Chain> of(const py::list& steps, int inputs) {
    auto chain = std::make_unique<Chain>();
    chain->inputs_ = inputs;
    for (const py::handle& each : steps) {
      const auto fields = py::cast<py::tuple>(each);
      if (fields.size() != 4) throw py::value_error("Chain: steps: expected tuples of 4");
      Step& s = chain->steps_.emplace_back();
      s.input = fields[0].cast<int>(), s.residual = fields[1].cast<int>();
      s.overwrite = fields[2].cast<bool>();
      const int known = inputs + int(chain->steps_.size()) - 1;
      if (s.input < 0 || s.input >= known || s.residual < -1 || s.residual >= known)
        throw py::value_error("Chain: steps: an input or a residual that is not there yet");
      if (!chain->read_arguments(s, py::cast<py::tuple>(fields[3]))) return nullptr;
    }
    if (chain->steps_.empty()) throw py::value_error("Chain: steps: expected one at least");
    return chain;
  }

  py::object run(py::handle make, const py::args& inputs) const {
    if (int(inputs.size()) != inputs_) throw py::value_error("Chain: another number of inputs");
    PyObject* result = computed(make.ptr(), inputs.ptr());
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

 private:
  struct Step {
    int input, residual;  // numbers of values; -1: none
    bool overwrite;
    enum { kConvolution, kBlock, kPooling } kind;
    Inverted block;
    PoolKind pool;
    PyObject* windows;  // see Pool::read
    Conv conv;
    Tensor weight;  // the convolution's, whose sizes are these
    int64_t shape[Prepared::kMostDims], strides[Prepared::kMostDims];
  };
  // An input of the chain, or what a step gives.
  struct Value {
    Tensor tensor;
    int64_t shape[kMaxDims], strides[kMaxDims];
    bool last = false;  // channels
    double operations = 0;
    int64_t bytes = 0, offset = 0;
    size_t last_use = 0;  // the step
    std::unique_ptr<Pool> pool;
  };

  bool read_arguments(Step& s, const py::tuple& arguments) {
    held_.push_back(arguments);
    PyObject* const* items = &PyTuple_GET_ITEM(arguments.ptr(), 0);
    const auto count = int(arguments.size());
    if (count != kPoolArguments && count != kInvertedArguments && count != kLayerArguments)
      throw py::value_error("Chain: steps: another number of arguments");
    s.kind = count == kPoolArguments       ? Step::kPooling
             : count == kInvertedArguments ? Step::kBlock
                                           : Step::kConvolution;
    if (s.kind == Step::kPooling) {
      int kind;
      if (!integer(items[0], kAverage, kind) || s.residual >= 0) return false;
      s.pool = PoolKind(kind), s.windows = items[1];
      return true;
    }
    if (s.kind == Step::kBlock) return read_inverted(items, s.block);
    if (!read_layer(items, s.conv, s.weight)) return false;
    std::copy(s.weight.shape, s.weight.shape + s.weight.dims, s.shape);
    std::copy(s.weight.strides, s.weight.strides + s.weight.dims, s.strides);
    return true;
  }
  Tensor weight_of(const Step& s) const {
    Tensor w = s.weight;
    w.shape = s.shape, w.strides = s.strides;
    return w;
  }

  PyObject* computed(PyObject* make, PyObject* inputs) const {
    std::vector<Value> values(size_t(inputs_) + steps_.size());
    Precision precision;
    if (!readable()) return not_taken();
    for (int i = 0; i < inputs_; i++)
      if (!read(PyTuple_GET_ITEM(inputs, i), values[size_t(i)].tensor)) return not_taken();
    const Tensor& x = values[size_t(steps_[0].input)].tensor;
    if (!precision_of(x.type, kFewOperations, precision) || !quiet() || !grad_is_off() ||
        !find_sizes(values, precision))
      return not_taken();
    double operations = 0;
    for (const Value& v : values) operations += v.operations;
    const size_t bytes = place(values, precision);
    const Value& last = values.back();
    Tensor out;
    PyObject* result =
        new_image(make, x, last.shape, last.tensor.dims, last.last, last.tensor.type, out);
    if (!result) return not_taken();
    if (!as_made(out, last.shape, last.tensor.dims, last.last)) return not_taken(result);
    values.back().tensor.data = out.data;
    bool gone = false;
    result = tensors::run(result, operations, [&] {
      const Memory memory(bytes);
      for (size_t v = size_t(inputs_); v + 1 < values.size(); v++)
        values[v].tensor.data = memory.as<char>() + values[v].offset;
      try {
        for (size_t i = 0; i < steps_.size(); i++) compute(i, values, precision);
      } catch (const OperandGone&) {
        gone = true;
      }
    });
    return gone ? not_taken(result) : result;
  }

  // False where a step is not for these kernels.
  bool find_sizes(std::vector<Value>& values, Precision precision) const {
    for (size_t i = 0; i < steps_.size(); i++) {
      const Step& s = steps_[i];
      const Tensor& x = values[size_t(s.input)].tensor;
      Value& v = values[size_t(inputs_) + i];
      if (s.kind == Step::kPooling) {
        v.pool = std::make_unique<Pool>();
        if (!v.pool->read(s.windows, x.type, x.shape, x.dims)) return false;
        std::copy(v.pool->shape, v.pool->shape + x.dims, v.shape);
        v.last = v.pool->gives_channels_last(x, s.pool, false);
        v.operations = v.pool->operations();
      } else if (s.kind == Step::kBlock) {
        if (!sizes_of(x, s.block, v.shape)) return false;
        v.last = true;
        v.operations = operations_of(x, s.block);
      } else {
        const Tensor w = weight_of(s);
        if (x.dims < 3 || !sizes_of(x, w, s.conv, v.shape) || !layout_of(x, w, v.last))
          return false;
        v.operations = operations_of(v.shape, w);
      }
      strides_as_made(v.shape, x.dims, v.last, v.strides);
      v.tensor = {nullptr, nullptr, x.type, x.dims, v.shape, v.strides};
      double bytes = double(dtype_size(x.type));
      for (int d = 0; d < x.dims; d++) bytes *= double(v.shape[d]);
      if (bytes > 1e15) return false;  // for the long way to refuse
      v.bytes = round_up(int64_t(bytes), 64);
      v.last_use = i;
      values[size_t(s.input)].last_use = i;
      if (s.residual >= 0) {
        Value& r = values[size_t(s.residual)];
        if (r.tensor.type != x.type || !as_made(r.tensor, v.shape, x.dims, v.last)) return false;
        r.last_use = i;
      }
      if (s.kind == Step::kBlock && !takes_inverted_residual(block_of(i, values, precision)))
        return false;
    }
    return true;
  }

  // Offsets, in one block of memory, of what all steps but the last give: each the lowest at which
  // nothing lies that is still read. Returns the block's bytes.
  size_t place(std::vector<Value>& values, Precision precision) const {
    std::vector<const Value*> there;  // in the order of their offsets
    int64_t end = 0;
    for (size_t i = 0; i + 1 < steps_.size(); i++) {
      const Step& s = steps_[i];
      Value& v = values[size_t(inputs_) + i];
      auto gone = [&](const Value* value) { return value->last_use < i; };
      there.erase(std::remove_if(there.begin(), there.end(), gone), there.end());
      if (s.overwrite && s.kind == Step::kConvolution && s.residual >= inputs_ &&
          s.residual != s.input && conv_takes_its_own_residual(conv_of(i, values, precision))) {
        const Value* residual = &values[size_t(s.residual)];
        v.offset = residual->offset;
        *std::find(there.begin(), there.end(), residual) = &v;
        continue;
      }
      auto at = there.begin();
      for (; at != there.end() && v.offset + v.bytes > (*at)->offset; ++at)
        v.offset = (*at)->offset + (*at)->bytes;
      there.insert(at, &v);
      end = std::max(end, v.offset + v.bytes);
    }
    return size_t(end);
  }

  template <class Call>
  Call filled(Call c, size_t i, const std::vector<Value>& values, Precision precision) const {
    const Step& s = steps_[i];
    const Value& v = values[size_t(inputs_) + i];
    c.x = five(values[size_t(s.input)].tensor), c.y = five(v.tensor);
    if (s.residual >= 0) c.residual = values[size_t(s.residual)].tensor.data;
    // What a call of it alone would have.
    c.precision = v.operations < kFewOperations ? Precision::highest : precision;
    return c;
  }
  Inverted block_of(size_t i, const std::vector<Value>& values, Precision precision) const {
    return filled(steps_[i].block, i, values, precision);
  }
  Conv conv_of(size_t i, const std::vector<Value>& values, Precision precision) const {
    return filled(steps_[i].conv, i, values, precision);
  }

  void compute(size_t i, const std::vector<Value>& values, Precision precision) const {
    const Step& s = steps_[i];
    if (s.kind == Step::kPooling) {
      PoolCall call = values[size_t(inputs_) + i].pool->call;
      set(call.x, values[size_t(s.input)].tensor);
      set(call.out, values[size_t(inputs_) + i].tensor);
      return s.pool == kMaximum ? max_pool(call) : avg_pool(call);
    }
    if (s.kind == Step::kConvolution)
      conv_forward(conv_of(i, values, precision));
    else if (!inverted_residual(block_of(i, values, precision)))
      throw OperandGone("another thread has chosen other kernels since this one was asked for");
  }

  int inputs_ = 0;
  std::vector<Step> steps_;
  std::vector<py::tuple> held_;  // what the steps point to
};

}  // namespace

void bind_conv_chain(py::module_& m) {
  py::class_<Chain>(m, "Chain", "Convolutions and poolings one after the other; see Chain.of.")
      .def_static(
          "of", &Chain::of, py::arg("steps"), py::arg("inputs"),
          "Steps are (input, residual or -1, overwrite, arguments), the arguments weight to "
          "prepared of tensor_convolution, expand to project of "
          "tensor_inverted_residual, or kind and windows of tensor_pool. Inputs and residuals are "
          "numbers: those of the "
          "chain's own `inputs`, then those of the steps before. `overwrite`: whether "
          "nothing reads the residual from there on. None where a step is not understood.")
      .def("run", &Chain::run, py::arg("make"),
           "run(make, *inputs): what the last step gives; None, with nothing changed, where a step "
           "does not take what it is given.");
}
