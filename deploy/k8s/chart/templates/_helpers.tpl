{{- define "headstart.labels" -}}
app.kubernetes.io/name: headstart
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "headstart.image" -}}
{{ .root.Values.image.registry }}/{{ .image }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "headstart.remoteUrl" -}}
{{- if .Values.cacheConfig.remoteUrl }}{{ .Values.cacheConfig.remoteUrl }}{{ else if .Values.redis.enabled }}redis://{{ .Release.Name }}-redis:6379/0{{ end }}
{{- end }}

{{- /* headstart.yaml: the same file for every role; what differs by pod comes as HEADSTART_SECTION_KEY. */}}
{{- define "headstart.config" -}}
{{- $v := .Values }}
{{- if and $v.cacheConfig.diskHostPath (not $v.nodeShared.enabled) }}
{{- fail "cacheConfig.diskHostPath: a folder of the host belongs to one cachebus a node: set nodeShared.enabled, or leave it empty for a claim of each worker's" }}
{{- end }}
{{- if and $v.nodeShared.enabled $v.cacheConfig.diskOffloadingBufferSize (not $v.cacheConfig.diskHostPath) }}
{{- fail "cacheConfig.diskOffloadingBufferSize: a DaemonSet makes no claims: with nodeShared.enabled give cacheConfig.diskHostPath" }}
{{- end }}
{{- $model := dict "name" $v.modelURL "served_name" $v.name "dtype" $v.vllmConfig.dtype "kv_cache_dtype" $v.vllmConfig.kvCacheDtype "max_model_len" (int $v.vllmConfig.maxModelLen) "tensor_parallel_size" (int $v.vllmConfig.tensorParallelSize) "enforce_eager" $v.vllmConfig.enforceEager }}
{{- $cache := dict "chunk_size" (int $v.cacheConfig.chunkSize) "max_local_cpu_size" $v.cacheConfig.cpuOffloadingBufferSize "save_decode_cache" $v.cacheConfig.saveDecodeCache "metrics_port" 9400 "node_port" 7000 "peers_dns" (printf "nodes@%s-nodes:7000" .Release.Name) }}
{{- if $v.cacheConfig.diskOffloadingBufferSize }}
{{- $_ := set $cache "local_disk" "/var/lib/headstart/chunks" }}
{{- $_ := set $cache "max_local_disk_size" $v.cacheConfig.diskOffloadingBufferSize }}
{{- end }}
{{- with include "headstart.remoteUrl" . }}
{{- $_ := set $cache "remote_url" . }}
{{- $_ := set $cache "remote_ttl_seconds" (int $v.cacheConfig.remoteTtlSeconds) }}
{{- end }}
{{- $pools := dict }}
{{- range $role, $spec := dict "prefill" $v.prefillSpec "decode" $v.decodeSpec }}
{{- $args := concat $v.vllmConfig.extraArgs $spec.extraArgs | default list }}
{{- $_ := set $pools $role (dict "count" 1 "port" 8000 "metrics_port" 9401 "max_num_batched_tokens" (int $spec.maxNumBatchedTokens) "gpu_memory_utilization" $v.vllmConfig.gpuMemoryUtilization "kv_cache_gb" (int $v.vllmConfig.kvCacheGb) "engine_args" $args "start_seconds_max" (int $spec.startSeconds) "drain_seconds_max" (int $spec.drainSeconds)) }}
{{- end }}
{{- $router := dict "host" "0.0.0.0" "port" 8000 "drain_seconds_max" (int $v.routerSpec.drainSeconds) }}
{{- $security := dict "keys_dir" "/etc/headstart/keys" }}
{{- if $v.routerSpec.tenantsSecretName }}
{{- $_ := set $security "tenants_file" "/etc/headstart/tenants/tenants.yaml" }}
{{- end }}
{{- $made := dict "model" $model "cache" $cache "prefill" $pools.prefill "decode" $pools.decode "router" $router "security" $security }}
{{- toYaml (mergeOverwrite $made (deepCopy $v.config)) }}
{{- end }}

{{- define "headstart.podSecurity" -}}
automountServiceAccountToken: false
serviceAccountName: {{ .root.Release.Name }}
# Service variables such as HEADSTART_ROUTER_PORT would be read as settings.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "headstart.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities:
    drop: [ALL]
{{- end }}

{{- define "headstart.placement" -}}
{{- with .spec.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .spec.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "headstart.spread" -}}
topologySpreadConstraints:
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        app.kubernetes.io/instance: {{ $.root.Release.Name }}
        app.kubernetes.io/component: {{ $.component }}
{{- end }}
{{- end }}

{{- define "headstart.busEnv" -}}
- name: HEADSTART_CACHE_RUN_DIR
  value: /run/headstart/bus
- name: HEADSTART_CACHE_REGION_PATH
  value: /region/chunks
{{- end }}

{{- /* The section `scaling` of the settings, as variables of the router: in the file they would restart the workers, too. */}}
{{- define "headstart.scalingEnv" -}}
{{- $p := .Values.prefillSpec.autoscaling }}
{{- $d := .Values.decodeSpec.autoscaling }}
{{- $made := dict "prefill_min" $p.minReplicaCount "prefill_max" $p.maxReplicaCount "prefill_busy" $p.busy "backlog_seconds" $p.backlogSeconds }}
{{- $_ := merge $made (dict "decode_min" (max 1 (int $d.minReplicaCount)) "decode_max" $d.maxReplicaCount "kv_blocks_used" $d.kvBlocksUsed "inter_token_seconds" $d.interTokenSeconds) }}
{{- $_ := merge $made (dict "prefill_per_decode_min" .Values.scaling.prefillPerDecodeMin "prefill_per_decode_max" .Values.scaling.prefillPerDecodeMax) }}
{{- $_ := merge $made (dict "shrink_seconds" (max (int $p.cooldownPeriod) (int $d.cooldownPeriod)) "zero_seconds" .Values.scaling.zeroSeconds) }}
{{- range $key, $value := mergeOverwrite $made (deepCopy (default dict .Values.config.scaling)) }}
- name: HEADSTART_SCALING_{{ upper $key }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "headstart.podIp" -}}
- name: {{ . }}
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
{{- end }}

{{- /* MiB that a region of so many gigabytes takes. */}}
{{- define "headstart.regionMi" -}}
{{- add 64 (ceil (divf (mulf . 1000000000.0) 1048576.0) | int) }}
{{- end }}

{{- /* A cachebus container. gigabytes: its region; router: it only follows others, for the router beside it; sidecar: of a pod. */}}
{{- define "headstart.cachebus" -}}
- name: cachebus
  image: {{ include "headstart.image" (dict "root" .root "image" "cachebus") }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  args: [cachebus, --config, /etc/headstart/config/headstart.yaml]
  {{- if .sidecar }}
  # A sidecar of its pod: starts before the other containers, ends after them.
  restartPolicy: Always
  {{- end }}
  env:
    {{- include "headstart.busEnv" . | nindent 4 }}
    {{- include "headstart.podIp" "HEADSTART_CACHE_METRICS_HOST" | nindent 4 }}
    {{- if .router }}
    - name: HEADSTART_CACHE_PEER_WORKERS
      value: "true"
    - name: HEADSTART_CACHE_NODE_PORT
      value: "0"
    - name: HEADSTART_CACHE_MAX_LOCAL_CPU_SIZE
      value: "0.1"
    - name: HEADSTART_CACHE_LOCAL_DISK
      value: ""
    - name: HEADSTART_CACHE_MAX_LOCAL_DISK_SIZE
      value: "0"
    {{- else }}
    {{- include "headstart.podIp" "HEADSTART_CACHE_NODE_HOST" | nindent 4 }}
    {{- end }}
  ports:
    {{- if not .router }}
    - {name: node, containerPort: 7000}
    - {name: node-events, containerPort: 7001}
    - {name: node-bytes, containerPort: 7002}
    {{- end }}
    - {name: bus-metrics, containerPort: 9400}
  startupProbe:
    httpGet: {path: /ready, port: bus-metrics}
    periodSeconds: 2
    failureThreshold: 150
  readinessProbe:
    httpGet: {path: /ready, port: bus-metrics}
    periodSeconds: 5
  livenessProbe:
    httpGet: {path: /health, port: bus-metrics}
    periodSeconds: 10
    failureThreshold: 6
  {{- $mi := add (include "headstart.regionMi" .gigabytes | int) (int .root.Values.cachebus.overheadMemoryMi) }}
  resources:
    requests: {cpu: {{ ternary "100m" .root.Values.cachebus.requestCPU .router | quote }}, memory: {{ $mi }}Mi}
    limits: {cpu: {{ .root.Values.cachebus.limitCPU | quote }}, memory: {{ $mi }}Mi}
  {{- include "headstart.containerSecurity" . | nindent 2 }}
  volumeMounts:
    - {name: config, mountPath: /etc/headstart/config, readOnly: true}
    - {name: keys, mountPath: /etc/headstart/keys, readOnly: true}
    {{- if .root.Values.routerSpec.tenantsSecretName }}
    - {name: tenants, mountPath: /etc/headstart/tenants, readOnly: true}
    {{- end }}
    - {name: run, mountPath: /run/headstart}
    - {name: region, mountPath: /region}
    {{- if and .root.Values.cacheConfig.diskOffloadingBufferSize (not .router) }}
    - {name: nvme, mountPath: /var/lib/headstart}
    {{- end }}
{{- end }}

{{- /* Config, keys and tenants: volumes of every pod with a cachebus. */}}
{{- define "headstart.configVolumes" -}}
- name: config
  configMap:
    name: {{ .root.Release.Name }}-config
- name: keys
  secret:
    secretName: {{ .root.Values.keys.secretName }}
    defaultMode: 0440
    # All serving pods are one member, "nodes", so its own key is also one that is allowed; all routers are another, which may look and not borrow.
    items:
      - {key: {{ .member }}.secret, path: own.secret}
      - {key: {{ .member }}.public, path: own.public}
      - {key: digest.key, path: digest.key}
      - {key: nodes.public, path: allowed/node/nodes.public}
      {{- if eq .member "nodes" }}
      - {key: router.public, path: allowed/router/router.public}
      {{- end }}
{{- if .root.Values.routerSpec.tenantsSecretName }}
- name: tenants
  secret:
    secretName: {{ .root.Values.routerSpec.tenantsSecretName }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{- define "headstart.podVolumes" -}}
- name: run
  emptyDir:
    sizeLimit: 64Mi
- name: region
  emptyDir:
    medium: Memory
    sizeLimit: {{ include "headstart.regionMi" . }}Mi
{{- end }}

{{- define "headstart.hostVolumes" -}}
- name: run
  hostPath:
    path: {{ .Values.nodeShared.runPath }}
    type: DirectoryOrCreate
- name: region
  hostPath:
    path: {{ .Values.nodeShared.regionPath }}
    type: DirectoryOrCreate
{{- end }}
