/// The exported model: TorchScript with its description inside, run over a volume in batches.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

namespace torch::jit {
struct Module;  // its header is long to compile
}

using PixelMm = std::array<double, 2>;  // down, across

class Segmenter {
 public:
  /// Loads what `distseg export` wrote.
  /// @throws UserError no such file, not TorchScript, or without distseg's description.
  Segmenter(const std::filesystem::path& path, at::Device device);
  ~Segmenter();

  /// Labels of a volume, slice by slice; with n slices as channels, the ends of the volume repeat.
  /// @param hu_ZYX int16 HU, at least one slice.
  /// @param batch_size slices in one forward pass.
  /// @param progress is told how many slices are done.
  /// @param pixel_mm of the slices, down and across, for models that take it.
  /// @return uint8 [Z, Y, X].
  /// @throws UserError the model takes sizes of pixels, and they are not known.
  at::Tensor segment(const at::Tensor& hu_ZYX, int64_t batch_size, const std::function<void(int64_t)>& progress,
                     const std::optional<PixelMm>& pixel_mm = std::nullopt);

  const nlohmann::ordered_json& description() const { return description_; }

 private:
  at::Tensor segment_batch(const at::Tensor& hu_BCHW, const std::optional<PixelMm>& pixel_mm);

  at::Device device_;
  std::unique_ptr<torch::jit::Module> module_;
  nlohmann::ordered_json description_;
  int64_t n_slices_;
};
