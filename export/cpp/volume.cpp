#include "volume.h"

#include <ATen/ops/empty.h>

#include <cmath>
#include <cstring>
#include <sstream>

#include "error.h"
#include "npy.h"

namespace fs = std::filesystem;

namespace {

// As in distseg/data/volume.py.
constexpr int64_t kAirHu = -1024;
constexpr double kLowestHu = -32768, kHighestHu = 32767;  // what int16 holds
constexpr double kGreyLowHu = -1250, kGreyHighHu = 250;

Volume read_npy_volume(const fs::path& path) {
  const HuArray array = read_npy(path);
  if (array.shape.size() != 3) {
    throw UserError("volume " + path.string() + ": got an array of rank " + std::to_string(array.shape.size()) +
                    "; it must have slices, rows and columns; reshape it");
  }
  const at::Tensor hu_ZYX = at::empty(array.shape, at::kShort);
  std::memcpy(hu_ZYX.data_ptr(), array.values.data(), hu_ZYX.nbytes());
  return {hu_ZYX};
}

/// Like `hounsfield` of distseg/data/volume.py: CT in HU has air far below 0, a volume within 0..255 is grey.
Volume hounsfield(const at::Tensor& values_ZYX, const NiftiHeader& header, const fs::path& path) {
  const double low = values_ZYX.min().to(at::kDouble).item<double>();
  const double high = values_ZYX.max().to(at::kDouble).item<double>();
  if (!std::isfinite(low) || !std::isfinite(high)) {
    throw UserError("volume " + path.string() + ": holds NaN or infinite values; HU are finite; mend or leave it out");
  }
  if (low >= 0 && high <= 255) {
    const at::Tensor hu = values_ZYX.to(at::kFloat).div(255).mul(kGreyHighHu - kGreyLowHu).add(kGreyLowHu);
    return {hu.round().to(at::kShort), "grey_-1250_250", header};
  }
  if (low < kLowestHu || high > kHighestHu || low >= 0) {
    std::ostringstream text;
    text << "volume " << path.string() << ": got values " << low << ".." << high
         << "; neither HU (air is near -1000, nothing above 32767) nor grey 0..255; set slope and intercept, or leave it out";
    throw UserError(text.str());
  }
  return {values_ZYX.round().to(at::kShort).clamp_min(kAirHu), "hu", header};
}

}  // namespace

Volume read_volume(const fs::path& path) {
  if (path.extension() == ".npy") return read_npy_volume(path);
  if (!is_nifti(path)) {
    throw UserError("volume: got " + path.string() + "; its name must end in .nii.gz, .nii or .npy; convert it");
  }
  const NiftiVolume file = read_nifti(path);
  return hounsfield(axis_order(file.header).to_ZYX(file.values_KJI), file.header, path);
}

void check_output(const fs::path& input, const fs::path& output) {
  std::error_code absent;
  if (fs::equivalent(input, output, absent)) {
    throw UserError("output: got " + output.string() + ", which is the input; give another name");
  }
  const bool is_npy = input.extension() == ".npy";
  if (is_npy ? output.extension() != ".npy" : !is_nifti(output)) {
    throw UserError("output: got " + output.string() + "; the mask's name must end in " +
                    (is_npy ? ".npy" : ".nii.gz or .nii") + " as the volume's; rename it");
  }
}

void write_mask(const fs::path& path, const at::Tensor& mask_ZYX, const Volume& like) {
  if (like.header) {
    write_nifti(path, axis_order(*like.header).to_KJI(mask_ZYX), *like.header);
    return;
  }
  const at::Tensor mask = mask_ZYX.contiguous();
  write_npy(path, "|u1", mask.sizes(), {static_cast<const char*>(mask.data_ptr()), mask.nbytes()});
}

std::optional<double> voxel_ml(const Volume& volume) {
  if (!volume.header) return std::nullopt;
  return voxel_ml(*volume.header);
}
