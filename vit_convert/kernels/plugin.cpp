// VitAttention, VitWindowAttention, VitAddNorm, VitNorm, VitGroupNorm, VitAddGroupNorm and VitTwoGroupNorms as plugins
// of TensorRT 8.6.
//
// INT8 values carry either the scale in the node's attributes (`in_scale`, `out_scale`) or, where that is 0, the range
// of their tensor.
#include <NvInfer.h>
#include <dlfcn.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "encoder.h"

namespace {

using namespace nvinfer1;

// An attribute of a node, and the member of `Record` that holds it.
template <typename Record>
struct Field {
  char const* name;
  int32_t Record::*whole;
  float Record::*real;  // where it is no whole number
};

// What an engine keeps of a node of attention or LayerNorm, byte by byte: engines of before know this order.
struct Settings {
  // branch: 0 any type, 1 float, 2 half, 3 int8
  int32_t heads = 0, tokens = 0, head = 64, int8_in = 1, quantized = 1, branch = 0, causal = 0, windows = 1;
  float in_scale = 0, out_scale = 0, epsilon = 1e-6f;

  static std::vector<Field<Settings>> fields() {
    return {{"heads", &Settings::heads, nullptr},         {"tokens", &Settings::tokens, nullptr},
            {"head", &Settings::head, nullptr},           {"int8_in", &Settings::int8_in, nullptr},
            {"quantized", &Settings::quantized, nullptr}, {"branch", &Settings::branch, nullptr},
            {"causal", &Settings::causal, nullptr},       {"windows", &Settings::windows, nullptr},
            {"in_scale", nullptr, &Settings::in_scale},   {"out_scale", nullptr, &Settings::out_scale},
            {"epsilon", nullptr, &Settings::epsilon}};
  }
};

// The same of GroupNorm.
struct GroupSettings {
  int32_t groups = vit::kGroups;
  float epsilon = 1e-6f;

  static std::vector<Field<GroupSettings>> fields() {
    return {{"groups", &GroupSettings::groups, nullptr}, {"epsilon", nullptr, &GroupSettings::epsilon}};
  }
};

bool is_half(PluginTensorDesc const& d) { return d.type == DataType::kHALF && d.format == TensorFormat::kLINEAR; }
bool is_float(PluginTensorDesc const& d) { return d.type == DataType::kFLOAT && d.format == TensorFormat::kLINEAR; }
// [images, height, width, channels], these padded to a multiple of 8.
bool is_interleaved(PluginTensorDesc const& d) { return d.type == DataType::kHALF && d.format == TensorFormat::kHWC8; }
// Of 1 x 1 pixels: rows.
bool is_int8(PluginTensorDesc const& d) { return d.type == DataType::kINT8 && d.format == TensorFormat::kCHW32; }
float scale_of(float attribute, PluginTensorDesc const& d) { return attribute > 0 ? attribute : d.scale; }

// What all of them have in common. An engine keeps `Record` as it lies in memory.
template <typename Derived, typename Record = Settings>
class Plugin : public IPluginV2DynamicExt {
 public:
  using Kept = Record;
  explicit Plugin(Record const& settings) : s_(settings) {}
  Plugin(void const* data, size_t) { std::memcpy(&s_, data, sizeof s_); }
  char const* getPluginType() const noexcept override { return Derived::kName; }
  char const* getPluginVersion() const noexcept override { return "1"; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete static_cast<Derived*>(this); }
  void setPluginNamespace(char const* space) noexcept override { space_ = space; }
  char const* getPluginNamespace() const noexcept override { return space_.c_str(); }
  size_t getSerializationSize() const noexcept override { return sizeof s_; }
  void serialize(void* to) const noexcept override { std::memcpy(to, &s_, sizeof s_); }
  void configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                       int32_t) noexcept override {}
  size_t getWorkspaceSize(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) const noexcept override {
    return 0;
  }
  DimsExprs getOutputDimensions(int32_t, DimsExprs const* in, int32_t, IExprBuilder&) noexcept override {
    return in[0];
  }
  IPluginV2DynamicExt* clone() const noexcept override {
    return new Derived(*static_cast<Derived const*>(this));
  }

 protected:
  Record s_;
  std::string space_;
};

// Rows of queries, keys and values in, rows of a third of their width out.
DimsExprs a_third(DimsExprs const& in, IExprBuilder& builder) {
  DimsExprs out(in);
  out.d[1] = builder.operation(DimensionOperation::kFLOOR_DIV, *in.d[1], *builder.constant(3));
  return out;
}

class AttentionPlugin final : public Plugin<AttentionPlugin> {
 public:
  static constexpr char const* kName = "VitAttention";
  using Plugin::Plugin;
  DimsExprs getOutputDimensions(int32_t, DimsExprs const* in, int32_t, IExprBuilder& builder) noexcept override {
    return a_third(in[0], builder);
  }
  DataType getOutputDataType(int32_t, DataType const* in, int32_t) const noexcept override {
    return s_.quantized && s_.out_scale > 0 ? DataType::kINT8 : in[0] == DataType::kINT8 ? DataType::kHALF : in[0];
  }
  bool supportsFormatCombination(int32_t i, PluginTensorDesc const* all, int32_t, int32_t) noexcept override {
    return (i == 0 ? s_.int8_in : s_.quantized) ? is_int8(all[i]) : is_half(all[i]);
  }
  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const* out, void const* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    float const scale = s_.int8_in ? scale_of(s_.in_scale, in[0]) : 1.0f;
    vit::Attention p{};
    p.qkv = inputs[0];
    p.out = outputs[0];
    p.images = in[0].dims.d[0] / s_.tokens;
    p.tokens = s_.tokens;
    p.heads = s_.heads;
    p.head = s_.head;
    p.int8_in = s_.int8_in != 0;
    p.int8_out = s_.quantized != 0;
    p.causal = s_.causal != 0;
    p.score_scale = scale * scale / std::sqrt(static_cast<float>(s_.head));
    p.output_scale = s_.quantized ? scale / scale_of(s_.out_scale, out[0]) : scale;
    return vit::run(p, stream);
  }
};

// (qkv, bias) -> attended within windows
class WindowsPlugin final : public Plugin<WindowsPlugin> {
 public:
  static constexpr char const* kName = "VitWindowAttention";
  using Plugin::Plugin;
  DimsExprs getOutputDimensions(int32_t, DimsExprs const* in, int32_t, IExprBuilder& builder) noexcept override {
    return a_third(in[0], builder);
  }
  DataType getOutputDataType(int32_t, DataType const* in, int32_t) const noexcept override { return in[0]; }
  bool supportsFormatCombination(int32_t i, PluginTensorDesc const* all, int32_t, int32_t) noexcept override {
    return i == 1 ? is_float(all[i]) : is_half(all[i]);
  }
  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
                  void*, cudaStream_t stream) noexcept override {
    vit::Windows p{};
    p.qkv = inputs[0];
    p.bias = static_cast<float const*>(inputs[1]);
    p.out = outputs[0];
    p.windows = in[0].dims.d[0] / s_.tokens;
    p.own = s_.windows;
    p.tokens = s_.tokens;
    p.heads = s_.heads;
    p.head = s_.head;
    p.score_scale = 1.0f / std::sqrt(static_cast<float>(s_.head));
    return vit::run(p, stream);
  }
};

// (branch, residual, gamma, beta) -> (sum, normalised), or (residual, gamma, beta) -> (normalised)
template <bool kAdds>
class NormPlugin final : public Plugin<NormPlugin<kAdds>> {
 public:
  static constexpr char const* kName = kAdds ? "VitAddNorm" : "VitNorm";
  using Base = Plugin<NormPlugin<kAdds>>;
  using Base::Base;
  using Base::s_;
  int32_t getNbOutputs() const noexcept override { return kAdds ? 2 : 1; }
  DataType getOutputDataType(int32_t i, DataType const* in, int32_t) const noexcept override {
    return i == kAdds && s_.quantized && s_.out_scale > 0 ? DataType::kINT8 : in[kAdds];
  }
  bool supportsFormatCombination(int32_t i, PluginTensorDesc const* all, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (i == inputs - 2 || i == inputs - 1) return is_float(all[i]);
    if (i == inputs + outputs - 1) return s_.quantized ? is_int8(all[i]) : is_half(all[i]);
    if (!kAdds || i != 0) return is_half(all[i]);
    bool const any = s_.branch == 0;
    return ((any || s_.branch == 1) && is_float(all[i])) || ((any || s_.branch == 2) && is_half(all[i])) ||
           ((any || s_.branch == 3) && is_int8(all[i]));
  }
  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const* out, void const* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    vit::Type const type = !kAdds || in[0].type == DataType::kFLOAT ? vit::Type::kFloat
                           : in[0].type == DataType::kHALF          ? vit::Type::kHalf
                                                                    : vit::Type::kInt8;
    vit::Norm p{};
    p.branch = kAdds ? inputs[0] : nullptr;
    p.branch_type = type;
    p.residual = inputs[kAdds];
    p.sum = kAdds ? outputs[0] : nullptr;
    p.out = outputs[kAdds];
    p.int8_out = s_.quantized != 0;
    p.gamma = static_cast<float const*>(inputs[kAdds + 1]);
    p.beta = static_cast<float const*>(inputs[kAdds + 2]);
    p.rows = in[0].dims.d[0];
    p.width = in[0].dims.d[1];
    p.branch_scale = type == vit::Type::kInt8 ? scale_of(s_.in_scale, in[0]) : 1.0f;
    p.output_scale = s_.quantized ? 1.0f / scale_of(s_.out_scale, out[kAdds]) : 1.0f;
    p.epsilon = s_.epsilon;
    return vit::run(p, stream);
  }
};

// relu(GroupNorm(x) + rest): (x, gamma, beta), (x, residual, gamma, beta), or (x, residual, gamma, beta, gamma and beta
// of the residual) -> one tensor
enum class Rest { kNone, kAdded, kNormalised };

template <Rest kRest>
class GroupNormPlugin final : public Plugin<GroupNormPlugin<kRest>, GroupSettings> {
 public:
  static constexpr char const* kName = kRest == Rest::kNone    ? "VitGroupNorm"
                                       : kRest == Rest::kAdded ? "VitAddGroupNorm"
                                                               : "VitTwoGroupNorms";
  static constexpr int kTensors = kRest == Rest::kNone ? 1 : 2;  // of the inputs, before the parameters
  using Base = Plugin<GroupNormPlugin<kRest>, GroupSettings>;
  using Base::Base;
  using Base::s_;
  DataType getOutputDataType(int32_t, DataType const* in, int32_t) const noexcept override { return in[0]; }
  bool supportsFormatCombination(int32_t i, PluginTensorDesc const* all, int32_t inputs, int32_t) noexcept override {
    if (i >= kTensors && i < inputs) return is_float(all[i]);
    if (i > 0) return all[i].type == all[0].type && all[i].format == all[0].format;
    return (is_interleaved(all[0]) && all[0].dims.nbDims == 4 && vit::interleaves(all[0].dims.d[1])) ||
           is_float(all[0]) || is_half(all[0]);
  }
  size_t getWorkspaceSize(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*,
                          int32_t) const noexcept override {
    return is_interleaved(in[0]) ? vit::group_norm_workspace(in[0].dims.d[0]) : 0;
  }
  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override {
    if (s_.groups != vit::kGroups || in[0].dims.nbDims != 4) return cudaErrorInvalidValue;
    auto const parameter = [&](int i) { return static_cast<float const*>(inputs[kTensors + i]); };
    vit::GroupNorm p{};
    p.x = inputs[0];
    p.residual = kTensors > 1 ? inputs[kTensors - 1] : nullptr;
    p.out = outputs[0];
    p.gamma = parameter(0);
    p.beta = parameter(1);
    if constexpr (kRest == Rest::kNormalised) {
      p.residual_gamma = parameter(2);
      p.residual_beta = parameter(3);
    }
    p.type = in[0].type == DataType::kFLOAT ? vit::Type::kFloat : vit::Type::kHalf;
    p.interleaved = is_interleaved(in[0]);
    p.images = in[0].dims.d[0];
    p.channels = in[0].dims.d[1];
    p.pixels = in[0].dims.d[2] * in[0].dims.d[3];
    p.epsilon = s_.epsilon;
    p.workspace = workspace;
    return vit::run(p, stream);
  }
};

template <typename Made>
class Creator final : public IPluginCreator {
  using Kept = typename Made::Kept;

 public:
  Creator() {
    for (auto const& known : Kept::fields()) {
      auto const type = known.whole != nullptr ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32;
      fields_.emplace_back(known.name, nullptr, type, 1);
    }
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }
  char const* getPluginName() const noexcept override { return Made::kName; }
  char const* getPluginVersion() const noexcept override { return "1"; }
  PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  void setPluginNamespace(char const* space) noexcept override { space_ = space; }
  char const* getPluginNamespace() const noexcept override { return space_.c_str(); }
  IPluginV2* createPlugin(char const*, PluginFieldCollection const* given) noexcept override {
    Kept s;
    for (int i = 0; i < given->nbFields; ++i) {
      PluginField const& field = given->fields[i];
      for (auto const& known : Kept::fields()) {
        if (std::strcmp(field.name, known.name) != 0) continue;
        if (known.whole != nullptr) {
          s.*known.whole = *static_cast<int32_t const*>(field.data);
        } else {
          s.*known.real = *static_cast<float const*>(field.data);
        }
      }
    }
    return new Made(s);
  }
  IPluginV2* deserializePlugin(char const*, void const* data, size_t bytes) noexcept override {
    return new Made(data, bytes);
  }

 private:
  std::string space_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

Creator<AttentionPlugin> attention_creator;
Creator<WindowsPlugin> windows_creator;
Creator<NormPlugin<true>> add_norm_creator;
Creator<NormPlugin<false>> norm_creator;
Creator<GroupNormPlugin<Rest::kNone>> group_norm_creator;
Creator<GroupNormPlugin<Rest::kAdded>> add_group_norm_creator;
Creator<GroupNormPlugin<Rest::kNormalised>> two_group_norms_creator;

}  // namespace

// Registers all of them with the TensorRT that this process has loaded; 0 where that worked.
extern "C" int vit_register() {
  void* library = dlopen("libnvinfer.so.8", RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return 1;
  auto const registry = reinterpret_cast<IPluginRegistry* (*)()>(dlsym(library, "getPluginRegistry"));
  if (registry == nullptr) return 2;
  IPluginCreator* const creators[] = {&attention_creator,  &windows_creator,        &add_norm_creator,
                                      &norm_creator,       &group_norm_creator,     &add_group_norm_creator,
                                      &two_group_norms_creator};
  for (IPluginCreator* creator : creators) {
    if (!registry()->registerCreator(*creator, "")) return 3;
  }
  return 0;
}
