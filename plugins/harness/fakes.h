// What TensorRT supplies to a plugin: dimension expressions, a logger, a context's resources. Just enough to call one.
#pragma once

#include <NvInferRuntime.h>

#include <cstdio>
#include <deque>
#include <string>
#include <vector>

namespace harness {

// A number, or a symbol such as "B" whose value the builder does not know.
class Expression final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Expression(int64_t value) : constant_(true), value_(value), text_(std::to_string(value)) { bind(); }
  explicit Expression(std::string text) : constant_(false), value_(0), text_(std::move(text)) { bind(); }
  ~Expression() noexcept override = default;
  std::string const& text() const { return text_; }
  static std::string text_of(nvinfer1::IDimensionExpr const* expression) {
    return static_cast<Expression const*>(expression)->text_;
  }

 private:
  void bind() { mImpl = this; }
  bool isConstant() const override { return constant_; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

  bool constant_;
  int64_t value_;
  std::string text_;
};

class ExpressionBuilder final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
 public:
  ExpressionBuilder() { mImpl = this; }
  ~ExpressionBuilder() noexcept override = default;
  nvinfer1::IDimensionExpr const* number(int64_t value) { return &made_.emplace_back(value); }
  nvinfer1::IDimensionExpr const* symbol(std::string name) { return &made_.emplace_back(std::move(name)); }

 private:
  nvinfer1::IDimensionExpr const* constant(int64_t value) override { return number(value); }
  nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation op, nvinfer1::IDimensionExpr const& first,
                                            nvinfer1::IDimensionExpr const& second) override {
    if (op != nvinfer1::DimensionOperation::kPROD) return nullptr;
    if (first.isConstant() && second.isConstant()) return number(first.getConstantValue() * second.getConstantValue());
    return symbol("(" + Expression::text_of(&first) + " * " + Expression::text_of(&second) + ")");
  }
  nvinfer1::IDimensionExpr const* declareSizeTensor(int32_t, nvinfer1::IDimensionExpr const&,
                                                    nvinfer1::IDimensionExpr const&) override {
    return nullptr;
  }

  std::deque<Expression> made_;
};

class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, nvinfer1::AsciiChar const* text) noexcept override {
    if (severity <= Severity::kERROR) errors.emplace_back(text);
    if (severity == Severity::kWARNING) std::printf("warning: %s\n", text);
  }
  // Everything since the last call, for asserting on what a refusal said.
  std::string take() {
    std::string all;
    for (std::string const& error : errors) all += error + "\n";
    errors.clear();
    return all;
  }
  std::vector<std::string> errors;
};

class Finder final : public nvinfer1::ILoggerFinder {
 public:
  explicit Finder(Logger& logger) : logger_(logger) {}
  nvinfer1::ILogger* findLogger() override { return &logger_; }
  ~Finder() override = default;

 private:
  Logger& logger_;
};

class Context final : public nvinfer1::IPluginResourceContext {
 public:
  ~Context() noexcept override = default;
  nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

}  // namespace harness
