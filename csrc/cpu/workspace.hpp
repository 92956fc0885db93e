// Memory of one thread for the length of one call; uninitialised, whole cache lines.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace athanor::cpu {

class Workspace {
public:
    // `count` floats; what an earlier call returned is gone.
    float* take(std::int64_t count) {
        if (count > size_) {
            memory_.reset();
            memory_.reset(static_cast<float*>(::operator new(static_cast<std::size_t>(count) * sizeof(float), std::align_val_t(64))));
            size_ = count;
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::unique_ptr<float, Free> memory_;
    std::int64_t size_ = 0;
};

}  // namespace athanor::cpu
