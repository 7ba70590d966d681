{{- define "countersign.image" -}}
{{ .Values.image | default (printf "registry.example.com/tools/countersign:%s" .Chart.AppVersion) }}
{{- end }}

{{- /* The image without its tag and digest: what is in `allow`, so that it can always be started. */ -}}
{{- define "countersign.repository" -}}
{{ regexReplaceAll ":[^:/]*$" (include "countersign.image" . | splitList "@" | first) "" }}
{{- end }}

{{- define "countersign.restricted" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* One of the two webhooks: a dict of root, and the path that is called. */ -}}
{{- define "countersign.webhook" -}}
- name: admission.countersign.dev
  admissionReviewVersions: [v1]
  sideEffects: NoneOnDryRun
  # Nothing runs that was not looked at.
  failurePolicy: {{ .root.Values.admission.failurePolicy }}
  timeoutSeconds: {{ .root.Values.admission.timeoutSeconds }}
  clientConfig:
    service: {namespace: {{ .root.Release.Namespace }}, name: countersign-admission, path: {{ .path }}}
    caBundle: {{ .root.Values.admission.caBundle }}
  # What the cluster and countersign itself need to come up again when countersign is away. Whoever may label namespaces can
  # exempt them; let that be few.
  namespaceSelector:
    matchExpressions:
      - {key: kubernetes.io/metadata.name, operator: NotIn, values: [kube-system, {{ .root.Release.Namespace }}]}
      - {key: countersign.dev/admission, operator: NotIn, values: ["off"]}
  rules:
    - operations: [CREATE, UPDATE]
      apiGroups: [""]
      apiVersions: ["*"]
      resources: [pods, pods/ephemeralcontainers, replicationcontrollers]
      scope: Namespaced
    - operations: [CREATE, UPDATE]
      apiGroups: [apps]
      apiVersions: ["*"]
      resources: [deployments, replicasets, statefulsets, daemonsets]
      scope: Namespaced
    - operations: [CREATE, UPDATE]
      apiGroups: [batch]
      apiVersions: ["*"]
      resources: [jobs, cronjobs]
      scope: Namespaced
    {{- with .root.Values.admission.rules }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{- /* Names and these TCP ports: a list. */ -}}
{{- define "countersign.egress" -}}
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
    {{- range . }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end }}

{{- /* Whether the webhook asks the cluster's API for anything: a text, or none. */ -}}
{{- define "countersign.asks" -}}
{{ with .Values.admission.kubernetes }}{{ if or .resources .pullSecrets .events .recheck }}yes{{ end }}{{ end }}
{{- end }}

{{- /* The line of the configuration that says so. */ -}}
{{- define "countersign.kubernetes" -}}
{{- if include "countersign.asks" . }}
{{- with .Values.admission.kubernetes }}
kubernetes = { resources = {{ .resources }}, pull_secrets = {{ .pullSecrets }}, events = {{ .events }}
{{- with .recheck }}, recheck = { every = {{ . | quote }} }{{ end }} }
{{- end }}
{{- end }}
{{- end }}
