/// A chest CT as the model takes it, from .npy or NIfTI, and its mask on the same grid.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <filesystem>
#include <optional>
#include <string>

#include "nifti.h"

struct Volume {
  at::Tensor hu_ZYX;             // int16; x to the patient's Left, y to Posterior, z to Superior
  std::string intensity = "hu";  // or "grey_-1250_250": grey 0..255, mapped back
  std::optional<NiftiHeader> header = std::nullopt;  // of a NIfTI file
};

/// What the values of a NIfTI file are: found by themselves, or as the user says.
enum class Intensity { kAuto, kHu, kGrey };

/// Reads a volume: .npy of int16 HU [Z, Y, X], or .nii or .nii.gz in any axis order, in HU or in grey 0..255.
/// @throws UserError no volume, damaged, or neither HU nor grey.
Volume read_volume(const std::filesystem::path& path, Intensity intensity = Intensity::kAuto);

/// Refuses a name that the mask of such a volume cannot have, before time is spent on it.
void check_output(const std::filesystem::path& input, const std::filesystem::path& output);

/// Writes uint8 labels in the volume's own format, axis order and place.
void write_mask(const std::filesystem::path& path, const at::Tensor& mask_ZYX, const Volume& like);

/// Of a slice's pixels, down and across; nothing where the file does not say.
std::optional<std::array<double, 2>> pixel_mm(const Volume& volume);

/// Of one voxel; nothing where the file does not say.
std::optional<double> voxel_ml(const Volume& volume);
