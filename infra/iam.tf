# Four parties, each with the rights for its part and no more:
#   instance    the agent on a host: joins Batch's cluster, pulls this image, writes these logs
#   execution   what starts a container: the same image and logs, and exactly the secrets given
#   job         the command in the container: reads checkouts, reads and writes runs
#   submit      a policy for people: sends checkouts, submits and watches jobs, cancels this project's
# Batch itself acts by its service-linked role, which AWS makes with the first environment.

locals {
  ecs_arn   = "arn:${local.partition}:ecs:${var.region}:${local.account}"
  batch_arn = "arn:${local.partition}:batch:${var.region}:${local.account}"

  definition_arns = [
    "${local.batch_arn}:job-definition/${aws_batch_job_definition.single.name}",
    "${local.batch_arn}:job-definition/${aws_batch_job_definition.multi.name}",
  ]
  # With other shared memory, as --shm of scripts/submit_batch.py registers them.
  copy_arns = [for arn in local.definition_arns : "${arn}-shm-*"]
}

data "aws_iam_policy_document" "assume_instance" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "assume_task" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ecs-tasks.amazonaws.com"]
    }

    # Only for containers of this account.
    condition {
      test     = "StringEquals"
      variable = "aws:SourceAccount"
      values   = [local.account]
    }
  }
}

# To pull the image and write the logs, which both an instance and an execution role do.
data "aws_iam_policy_document" "image_and_logs" {
  statement {
    sid       = "LogIn"
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"] # The only way to say it: the token is the account's.
  }

  statement {
    sid = "PullImage"
    actions = [
      "ecr:BatchCheckLayerAvailability",
      "ecr:BatchGetImage",
      "ecr:GetDownloadUrlForLayer",
    ]
    resources = [aws_ecr_repository.this.arn]
  }

  statement {
    sid       = "WriteLogs"
    actions   = ["logs:CreateLogStream", "logs:PutLogEvents"]
    resources = ["${aws_cloudwatch_log_group.this.arn}:*"]
  }
}

# Instance: the actions of AWS's AmazonEC2ContainerServiceforEC2Role that Batch's agent uses, without
# making clusters, and on this account's clusters, this image and these logs alone.

resource "aws_iam_role" "instance" {
  name               = "${var.name}-instance"
  description        = "Hosts of Batch jobs of ${var.name}"
  assume_role_policy = data.aws_iam_policy_document.assume_instance.json
}

resource "aws_iam_instance_profile" "instance" {
  name = "${var.name}-instance"
  role = aws_iam_role.instance.name
}

resource "aws_iam_role_policy" "instance" {
  name   = "batch-host"
  role   = aws_iam_role.instance.id
  policy = data.aws_iam_policy_document.instance.json
}

data "aws_iam_policy_document" "instance" {
  source_policy_documents = [data.aws_iam_policy_document.image_and_logs.json]

  statement {
    sid       = "FindCluster"
    actions   = ["ec2:DescribeTags", "ecs:DiscoverPollEndpoint"]
    resources = ["*"] # Neither action knows resources.
  }

  statement {
    sid = "JoinCluster"
    actions = [
      "ecs:DeregisterContainerInstance",
      "ecs:ListTagsForResource",
      "ecs:Poll",
      "ecs:RegisterContainerInstance",
      "ecs:StartTelemetrySession",
      "ecs:SubmitAttachmentStateChanges",
      "ecs:SubmitContainerStateChange",
      "ecs:SubmitTaskStateChange",
      "ecs:UpdateContainerInstancesState",
    ]
    # Batch names its clusters itself.
    resources = [for kind in ["cluster", "container-instance", "task"] : "${local.ecs_arn}:${kind}/*"]
  }

  statement {
    sid       = "TagItself"
    actions   = ["ecs:TagResource"]
    resources = ["${local.ecs_arn}:container-instance/*"]

    condition {
      test     = "StringEquals"
      variable = "ecs:CreateAction"
      values   = ["RegisterContainerInstance"]
    }
  }
}

# Execution

resource "aws_iam_role" "execution" {
  name               = "${var.name}-execution"
  description        = "Starts containers of Batch jobs of ${var.name}, with their secrets"
  assume_role_policy = data.aws_iam_policy_document.assume_task.json
}

resource "aws_iam_role_policy" "execution" {
  name   = "start-containers"
  role   = aws_iam_role.execution.id
  policy = data.aws_iam_policy_document.execution.json
}

data "aws_iam_policy_document" "execution" {
  source_policy_documents = [data.aws_iam_policy_document.image_and_logs.json]

  dynamic "statement" {
    for_each = length(var.secret_arns) > 0 ? [1] : []

    content {
      sid       = "ReadSecrets"
      actions   = ["secretsmanager:GetSecretValue"]
      resources = values(var.secret_arns)
    }
  }
}

# Job

resource "aws_iam_role" "job" {
  name               = "${var.name}-job"
  description        = "Commands of Batch jobs of ${var.name}"
  assume_role_policy = data.aws_iam_policy_document.assume_task.json
}

resource "aws_iam_role_policy" "job" {
  name   = "checkouts-and-runs"
  role   = aws_iam_role.job.id
  policy = data.aws_iam_policy_document.job.json
}

data "aws_iam_policy_document" "job" {
  statement {
    sid       = "ReadCheckouts"
    actions   = ["s3:GetObject"]
    resources = ["${aws_s3_bucket.this.arn}/${local.checkout_prefix}/*"]
  }

  statement {
    sid = "ReadAndWriteRuns"
    actions = [
      "s3:AbortMultipartUpload",
      "s3:DeleteObject",
      "s3:GetObject",
      "s3:ListMultipartUploadParts",
      "s3:PutObject",
    ]
    resources = ["${aws_s3_bucket.this.arn}/${local.runs_prefix}/*"]
  }

  statement {
    # The whole bucket: clients ask for its top before they write below it.
    sid       = "ListNames"
    actions   = ["s3:GetBucketLocation", "s3:ListBucket"]
    resources = [aws_s3_bucket.this.arn]
  }

  dynamic "statement" {
    for_each = var.kms_key_arn == null ? [] : [var.kms_key_arn]

    content {
      sid       = "UseKey"
      actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
      resources = [statement.value]
    }
  }
}

# Submit: attach it to the people and machines that submit jobs.

resource "aws_iam_policy" "submit" {
  name        = "${var.name}-submit"
  description = "To submit, watch and cancel Batch jobs of ${var.name}, and to use their run folders"
  policy      = data.aws_iam_policy_document.submit.json
}

data "aws_iam_policy_document" "submit" {
  statement {
    sid       = "SendCheckouts"
    actions   = ["s3:AbortMultipartUpload", "s3:GetObject", "s3:PutObject"]
    resources = ["${aws_s3_bucket.this.arn}/${local.checkout_prefix}/*"]
  }

  statement {
    sid       = "UseRuns"
    actions   = ["s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:PutObject"]
    resources = ["${aws_s3_bucket.this.arn}/${local.runs_prefix}/*"]
  }

  statement {
    sid       = "ListNames"
    actions   = ["s3:GetBucketLocation", "s3:ListBucket"]
    resources = [aws_s3_bucket.this.arn]
  }

  statement {
    sid     = "Submit"
    actions = ["batch:SubmitJob"]
    resources = concat(
      [for queue in aws_batch_job_queue.this : queue.arn],
      local.definition_arns,
      [for arn in local.definition_arns : "${arn}:*"],
      local.copy_arns,
    )
  }

  statement {
    # What a job is submitted with: the tag that says whose it is, and no other value of it.
    sid       = "TagJobs"
    actions   = ["batch:TagResource"]
    resources = ["${local.batch_arn}:job/*"]

    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/Project"
      values   = [var.name]
    }

    # A new job has no tags yet. Another project's job keeps its own.
    condition {
      test     = "StringEqualsIfExists"
      variable = "aws:ResourceTag/Project"
      values   = [var.name]
    }
  }

  statement {
    # A copy of a job definition with more shared memory, which a job cannot ask for by itself.
    sid       = "RegisterCopies"
    actions   = ["batch:RegisterJobDefinition", "batch:TagResource"]
    resources = local.copy_arns
  }

  statement {
    sid       = "PassRoles"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.job.arn, aws_iam_role.execution.arn]

    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ecs-tasks.amazonaws.com"]
    }
  }

  statement {
    # A job's ARN has no name in it that could tell whose it is: its tag does.
    sid       = "Cancel"
    actions   = ["batch:CancelJob", "batch:TerminateJob"]
    resources = ["${local.batch_arn}:job/*"]

    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/Project"
      values   = [var.name]
    }
  }

  statement {
    sid = "Watch"
    actions = [
      "batch:DescribeComputeEnvironments",
      "batch:DescribeJobDefinitions",
      "batch:DescribeJobQueues",
      "batch:DescribeJobs",
      "batch:ListJobs",
    ]
    resources = ["*"] # None of these actions knows resources.
  }

  statement {
    sid       = "ReadLogs"
    actions   = ["logs:DescribeLogStreams", "logs:FilterLogEvents", "logs:GetLogEvents"]
    resources = ["${aws_cloudwatch_log_group.this.arn}:*"]
  }

  dynamic "statement" {
    for_each = var.kms_key_arn == null ? [] : [var.kms_key_arn]

    content {
      sid       = "UseKey"
      actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
      resources = [statement.value]
    }
  }
}
