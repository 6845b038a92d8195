// Sizes that the kernels with int8 activations agree on.
#pragma once

#include <cstdint>

namespace slimba {
namespace {

constexpr std::int64_t kFew = 4;         // tokens, up to which rows are read for each by itself
constexpr std::int64_t kPanelRows = 64;  // that a kernel for many tokens likes to get at a time

}  // namespace
}  // namespace slimba
