// All ranks run the same tests in the same order. The first failure on any rank aborts the job:
// otherwise the other ranks would wait for ever.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#include <mpi.h>

#include <cstdio>
#include <string>

namespace {

struct EndAllRanks final : doctest::IReporter {
  explicit EndAllRanks(const doctest::ContextOptions&) {}

  void test_case_end(const doctest::CurrentTestCaseStats& test) override {
    if (test.testCaseSuccess) return;
    std::fflush(nullptr);
    MPI_Abort(MPI_COMM_WORLD, 1);
  }

  void report_query(const doctest::QueryData&) override {}
  void test_run_start() override {}
  void test_run_end(const doctest::TestRunStats&) override {}
  void test_case_start(const doctest::TestCaseData&) override {}
  void test_case_reenter(const doctest::TestCaseData&) override {}
  void test_case_exception(const doctest::TestCaseException&) override {}
  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}
  void log_assert(const doctest::AssertData&) override {}
  void log_message(const doctest::MessageData&) override {}
  void test_case_skipped(const doctest::TestCaseData&) override {}
};

// Runs after the reporter that prints the failure: doctest calls reporters in order of priority.
REGISTER_REPORTER("end-all-ranks", 1, EndAllRanks);

[[noreturn]] void refuse(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  MPI_Abort(MPI_COMM_WORLD, 1);
  std::abort();
}

}  // namespace

// test_ranks --ranks=N [options of doctest], where N is the number of ranks given to the launcher.
int main(int argc, char** argv) {
  int provided = 0, size = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  const std::string wanted = argc > 1 ? argv[1] : "";
  if (provided < MPI_THREAD_MULTIPLE) refuse("this MPI does not support MPI_THREAD_MULTIPLE");
  if (wanted != "--ranks=" + std::to_string(size)) refuse(std::to_string(size) + " ranks run, but not " + wanted);

  doctest::Context context(argc, argv);
  context.setOption("no-colors", true);
  context.setOption("no-intro", true);
  context.addFilter("reporters", "console,end-all-ranks");
  const int failed = context.run();
  MPI_Finalize();
  return failed;
}
