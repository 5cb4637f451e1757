#include "segmenter.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/cuda.h>

#include <algorithm>

#include "error.h"

namespace fs = std::filesystem;

namespace {

const nlohmann::ordered_json::json_pointer kSlices("/input/shape/1");
constexpr const char* kDescription = "distseg.json";  // its name inside model.pt

void check_device(at::Device device) {
  if (device.is_cuda() && !torch::cuda::is_available()) {
    throw UserError("--device: got cuda; this machine or this libtorch has none; use --device cpu");
  }
}

torch::jit::Module load(const fs::path& path, at::Device device, torch::jit::ExtraFilesMap& extra) {
  if (!fs::is_regular_file(path)) throw UserError("model: got " + path.string() + "; no such file; check the path");
  try {
    return torch::jit::load(path.string(), device, extra);
  } catch (const c10::Error& error) {
    throw UserError("model " + path.string() + ": not a readable TorchScript file; export it again");
  }
}

nlohmann::ordered_json parse_description(const std::string& text, const fs::path& path) {
  const auto parsed = nlohmann::ordered_json::parse(text, nullptr, false);
  if (!parsed.is_object() || !parsed.contains(kSlices) || !parsed.contains("regions")) {
    throw UserError("model " + path.string() + ": got a TorchScript file without " + kDescription +
                    "; it must come from `distseg export`");
  }
  return parsed;
}

}  // namespace

Segmenter::Segmenter(const fs::path& path, at::Device device) : device_(device) {
  check_device(device);
  torch::jit::ExtraFilesMap extra{{kDescription, ""}};
  module_ = std::make_unique<torch::jit::Module>(load(path, device, extra));
  module_->eval();
  description_ = parse_description(extra[kDescription], path);
  n_slices_ = description_.at(kSlices).get<int64_t>();
}

Segmenter::~Segmenter() = default;

at::Tensor Segmenter::segment(const at::Tensor& hu_ZYX, int64_t batch_size,
                              const std::function<void(int64_t)>& progress, const std::optional<PixelMm>& pixel_mm) {
  const auto spacing = description_.value("spacing_mm", nlohmann::ordered_json());
  if (!spacing.is_null() && !pixel_mm) {
    throw UserError("volume: got slices without the sizes of their pixels; this model sees pixels of " + spacing.dump() +
                    " mm; say --pixel-mm Y,X");
  }
  const std::optional<PixelMm> told = spacing.is_null() ? std::nullopt : pixel_mm;
  const c10::InferenceMode no_gradients;
  const int64_t n = hu_ZYX.size(0);
  const at::Tensor around = at::arange(n_slices_).sub(n_slices_ / 2);
  at::Tensor mask_ZYX = at::empty(hu_ZYX.sizes(), at::kByte);
  for (int64_t start = 0; start < n; start += batch_size) {
    const int64_t end = std::min(start + batch_size, n);
    const at::Tensor z_BC = at::arange(start, end).unsqueeze(1).add(around).clamp(0, n - 1);
    mask_ZYX.slice(0, start, end).copy_(segment_batch(hu_ZYX.index({z_BC}), told).squeeze(1));
    progress(end);
  }
  return mask_ZYX;
}

at::Tensor Segmenter::segment_batch(const at::Tensor& hu_BCHW, const std::optional<PixelMm>& pixel_mm) {
  std::vector<c10::IValue> inputs{hu_BCHW.to(device_)};
  if (pixel_mm) {
    at::Tensor sizes_B2 = at::empty({hu_BCHW.size(0), 2}, at::kFloat);
    sizes_B2.select(1, 0).fill_((*pixel_mm)[0]);
    sizes_B2.select(1, 1).fill_((*pixel_mm)[1]);
    inputs.emplace_back(sizes_B2.to(device_));
  }
  const auto outputs = module_->forward(inputs);
  if (!outputs.isTuple() || outputs.toTupleRef().size() != 2 || !outputs.toTupleRef().elements()[0].isTensor()) {
    throw UserError("model: its output is not the pair of mask and probability; export it again");
  }
  const at::Tensor mask_B1HW = outputs.toTupleRef().elements()[0].toTensor();
  if (mask_B1HW.scalar_type() != at::kByte || mask_B1HW.dim() != 4 || mask_B1HW.size(0) != hu_BCHW.size(0) || mask_B1HW.size(1) != 1 ||
      mask_B1HW.size(2) != hu_BCHW.size(2) || mask_B1HW.size(3) != hu_BCHW.size(3)) {
    throw UserError("model: its mask is not uint8 of the slices' size; export it again");
  }
  return mask_B1HW;
}
